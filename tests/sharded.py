"""What one of two processes finds out about sharded models; see `tests/test_sharding.py`."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recycle import sharding, world
from recycle.evaluate import OutputHead
from recycle.parscale import ActiveStreams, choose_streams
from tests.adapters import stream_model, token_ids
from tests.tiny import tiny_model

BACKBONES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
}
ROWS = {
    "backbone": None,
    "P = 2": ActiveStreams("default", 2, (2,)),
    "P = 4": ActiveStreams("default", 4, (4,)),
    "nested": ActiveStreams("default", 4, (2, 4)),
    "apart": ActiveStreams("default", 4, (2, 4), apart=True),
}
BATCH = token_ids(4, 12)


def main(rank: int, folder: str, port: int) -> None:
    """Join the other process, look at every backbone, and write down what was found."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with world.joined("cpu"):
        found = {kind: _look(kind, options) for kind, options in BACKBONES.items()}
        found["mixed"] = {"logits": _mixed()}
        found["unused"] = {"gradients": _unused()}
        found["shared"] = {"refused": _refused(tiny_model("zamba", **ZAMBA))}
        quantised = tiny_model()
        quantised.is_quantized = True
        found["quantised"] = {"refused": _refused(quantised)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


ZAMBA = {
    "num_hidden_layers": 6,
    "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "n_mamba_heads": 2,
}


def _frozen(kind: str, sharded: bool) -> PreTrainedModel:
    model = tiny_model(kind, **BACKBONES[kind]).requires_grad_(False)
    if sharded:
        sharding.shard(model, "cpu")
    return model


def _look(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    backbone = _frozen(kind, sharded=True)
    cut = sum(isinstance(x, DTensor) for x in backbone.parameters())
    held = sum(x.to_local().numel() for x in backbone.parameters() if isinstance(x, DTensor))
    whole, ours = stream_model(_frozen(kind, sharded=False)), stream_model(backbone)
    pairs = list(zip(_learned(whole), _learned(ours), strict=True))
    return {
        "sharded": [sharding.is_sharded(whole), sharding.is_sharded(ours)],
        "cut": cut,
        "held": held
        / sum(
            x.numel()
            for n, x in whole.named_parameters()
            if ".layers." in n and "parscale_" not in n
        ),
        "streams": sorted({f"{type(x).__name__} {x.dtype}" for _, x in pairs}),
        "starts": max(_apart(x, y) for x, y in pairs),
        "logits": {name: _logits_apart(whole, ours, active) for name, active in ROWS.items()},
        "gradients": [_gradients_apart(whole, ours, again) for again in (False, True)],
        "in groups": _gradients_apart(whole, ours, True, at_once=1),
        "lora": _gradients_apart(_lora(kind, False), _lora(kind, True), True, None),
        "replies": _replies(whole) == _replies(ours),
        "learning": _learn(whole, ours),
    }


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [x for x in model.parameters() if x.requires_grad]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _lora(kind: str, sharded: bool) -> Any:
    torch.manual_seed(world.rank())  # every process draws another start
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(_frozen(kind, sharded), config)
    sharding.share_start(_learned(model))
    return model.eval()


@torch.no_grad()
def _logits_apart(whole: Any, ours: Any, active: ActiveStreams | None) -> float:
    """In a forward pass on another batch than the other process's."""
    mine = BATCH[world.rank() :: 2]
    with choose_streams(whole, active), choose_streams(ours, active):
        return _apart(whole(mine).logits, ours(mine).logits)


def _loss(
    model: Any, ids: Tensor, active: ActiveStreams | None, at_once: int | None = None
) -> Tensor:
    with OutputHead(model, at_once) as head:
        return -head.log_probs(active, ids, ids).mean()


def _gradients_apart(
    whole: Any,
    ours: Any,
    again: bool,
    active: ActiveStreams | None = ROWS["nested"],
    at_once: int | None = None,
) -> float:
    """Between one process on the whole batch and two on half of it, in two micro-batches each."""
    for model in (whole, ours):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    _loss(whole, BATCH, active).backward()
    for row in BATCH[world.rank() :: 2]:
        (_loss(ours, row[None], active, at_once) / 2).backward()
    sharding.average_gradients(_learned(ours))
    for model in (whole, ours):
        model.gradient_checkpointing_disable()
        model.eval()
    pairs = zip(_learned(whole), _learned(ours), strict=True)
    return max(_apart(x.grad, y.grad) for x, y in pairs if x.grad is not None)


def _replies(model: Any) -> list[list[int]]:
    """Greedy tokens with a cache; one process asks for more of them than the other."""
    prompt = BATCH[world.rank() : world.rank() + 1, : 4 + 3 * world.rank()]
    new = 4 + 4 * world.rank()
    return model.generate(input_ids=prompt, max_new_tokens=new, do_sample=False).tolist()


def _learn(whole: Any, ours: Any) -> dict[str, float]:
    """Some steps of AdamW, by one process and by two."""
    losses: list[list[float]] = []
    for model, batch in ((whole, BATCH), (ours, BATCH[world.rank() :: 2])):
        optimizer = torch.optim.AdamW(_learned(model), lr=1e-2, weight_decay=0.0)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = _loss(model, batch, ROWS["nested"])
            loss.backward()
            if model is ours:
                sharding.average_gradients(_learned(model))
            optimizer.step()
            mean = world.add_up(loss.detach().clone()) / 2 if model is ours else loss
            losses[-1].append(float(mean))
    theirs = world.gather([x.tolist() for x in _learned(ours)])
    return {
        "loss": max(abs(x - y) for x, y in zip(*losses, strict=True)),
        "learned": losses[0][0] - losses[0][-1],
        "equal": theirs[0] == theirs[1],
    }


@torch.no_grad()
def _mixed() -> float:
    """Layers with norms in float32 and the rest in bfloat16."""
    models = [tiny_model().requires_grad_(False) for _ in range(2)]
    for model in models:
        for name, x in model.named_parameters():
            if "input_layernorm" not in name:
                x.data = x.data.bfloat16()
    sharding.shard(models[1], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        return _apart(*(model(BATCH).logits.float() for model in models))


def _unused() -> list[Any]:
    """Averages of gradients that both processes have, one of them, and none."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for number, x in enumerate(parameters):
        if number <= 1 - world.rank():
            x.grad = torch.full((2,), 2.0 + 2 * world.rank())
    sharding.average_gradients(parameters)
    return [None if x.grad is None else x.grad.tolist() for x in parameters]


def _refused(model: PreTrainedModel) -> str:
    try:
        sharding.shard(model.requires_grad_(False), "cpu")
    except sharding.ShardingError as error:
        return str(error)
    return ""
