"""Log-probabilities and gradients are those of the model's own logits, and few logits are held."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recycle.evaluate import OutputHead
from recycle.evaluate import head as head_module
from recycle.parscale import ActiveStreams, choose_streams, find_decoder
from recycle.train.learned import free_weights
from tests.adapters import stream_model, token_ids
from tests.tiny import VOCAB_SIZE, tiny_model

LLAMA_4 = {"head_dim": 16, "num_local_experts": 2, "no_rope_layers": [1, 0]}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gpt2", {}),  # a head below `transformer`
    ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
    ("modernbert-decoder", {}),  # a dense layer and a norm before the output matrix
    ("llama4_text", LLAMA_4),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 128}),  # a decoder two modules below
]
NESTED = ActiveStreams("default", 4, (2, 4))
APART = ActiveStreams("default", 4, (2, 4), apart=True)
IDS = token_ids(3, 11)
LABELS = torch.where(torch.arange(11) % 4 == 2, -100, IDS)
TILE = 4 * VOCAB_SIZE  # of 30 positions, 7 tiles and a smaller one


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TILE", TILE)


def plain(model: Any, active: ActiveStreams | None) -> Tensor:
    """Log-probabilities [|P|, B, S - 1] from the logits that the model itself gives."""
    with choose_streams(model, active):
        logits = model(input_ids=IDS, use_cache=False).logits
    by_p = logits.view(-1, *IDS.shape, logits.shape[-1])[:, :, :-1]
    losses = [F.cross_entropy(x.mT, LABELS[:, 1:], reduction="none") for x in by_p]
    return -torch.stack(losses)


def gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every position weighs differently."""
    model.zero_grad(set_to_none=True)
    weights = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(5))
    (weights * log_probs).mean().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_the_same(model: Any, active: ActiveStreams | None) -> dict[str, Tensor]:
    """The head's values and gradients are those of plain logits; the gradients are returned."""
    expected = plain(model, active)
    slopes = gradients(model, expected)
    with OutputHead(model) as head:
        found = head.log_probs(active, IDS, LABELS)
        own = gradients(model, found)
    assert found.shape == expected.shape
    assert (found[:, LABELS[:, 1:] == -100] == 0).all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)  # values of up to 30
    assert set(own) == set(slopes)
    largest = max(x.abs().max().item() for x in slopes.values())
    for name, gradient in slopes.items():
        assert (own[name] - gradient).abs().max() <= 1e-6 * max(largest, 1), name
    return own


@pytest.mark.parametrize(("model_type", "sizes"), MODELS)
def test_streams(model_type: str, sizes: dict[str, Any]) -> None:
    model = stream_model(tiny_model(model_type, **sizes), init="random")
    found = assert_the_same(model, APART)
    assert len(found) == 4 + 2 * 4  # keys and values of two layers, two aggregators
    assert_the_same(model, ActiveStreams("default", 2, (2,)))


@pytest.mark.parametrize(("model_type", "sizes"), MODELS)
def test_all_weights(model_type: str, sizes: dict[str, Any]) -> None:
    model = tiny_model(model_type, **sizes).requires_grad_(True)
    found = assert_the_same(model, None)
    assert any(x is model.get_output_embeddings().weight for x in parameters(model, found))
    streams: Any = stream_model(tiny_model(model_type, **sizes), init="random")
    free_weights(streams.get_base_model())
    assert len(assert_the_same(streams, NESTED)) == len(found) + 4 + 2 * 4


def parameters(model: Any, names: Any) -> Iterator[Tensor]:
    yield from (model.get_parameter(name) for name in names)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_lora(targets: Any) -> None:
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(tie_word_embeddings=False), config).eval()
    found = assert_the_same(model, None)
    assert any("lm_head" in name for name in found) == ("lm_head" in targets)


def test_gradient_checkpointing() -> None:
    model = stream_model(init="random").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_the_same(model, NESTED)


def numel(tensor: Tensor) -> int:
    """Of logits; other tensors count 0, also the output matrix itself, `[64, V]`."""
    logits = tensor.shape[-1:] == (VOCAB_SIZE,) and tensor.shape[:-1] != (64,)
    return tensor.numel() if logits else 0


class Sizes(TorchDispatchMode):
    """The most logits in any one tensor that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *map(numel, tensors), 0)
        return found


@pytest.mark.parametrize("learning", ["nothing", "streams", "weights"])
@pytest.mark.parametrize("model_type", ["gemma2", "modernbert-decoder"])
def test_no_more_than_a_tile_of_logits_is_ever_made(model_type: str, learning: str) -> None:
    backbone = tiny_model(model_type, **({"head_dim": 16} if model_type == "gemma2" else {}))
    model: Any = stream_model(backbone, init="random")
    if learning == "weights":
        free_weights(model.get_base_model())
    passes: list[int] = []
    with (
        OutputHead(model) as head,
        torch.set_grad_enabled(learning != "nothing"),
        backbone.get_output_embeddings().register_forward_hook(lambda *x: passes.append(1)),
        Sizes() as sizes,
    ):
        found = head.log_probs(NESTED, IDS, LABELS)
        if learning != "nothing":
            found.sum().backward()
    assert sizes.largest == TILE
    # The decoder's pass, and 8 tiles for each of two P; computed again only where the head learns.
    assert len(passes) == 1 + 2 * 8 * (2 if learning == "weights" else 1)


def test_what_is_kept_for_the_backward_pass_is_no_logits() -> None:
    model = stream_model(init="random")
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(numel(tensor))
        return tensor

    with OutputHead(model) as head, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        head.log_probs(NESTED, IDS, LABELS)
    assert max(kept) <= TILE  # inside a tile, while it is computed


def test_gradients_of_one_tile_do_not_pile_up() -> None:
    """A second backward pass adds the same again."""
    model = stream_model(init="random")
    with OutputHead(model) as head:
        found = head.log_probs(NESTED, IDS, LABELS).sum()
        found.backward(retain_graph=True)
        once = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        found.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


def test_the_model_is_as_before_inside_and_after() -> None:
    model = stream_model()
    with torch.no_grad():
        before = model(input_ids=IDS, labels=IDS)
        with OutputHead(model) as head, OutputHead(model) as inner:
            assert torch.equal(head.log_probs(NESTED, IDS, IDS), inner.log_probs(NESTED, IDS, IDS))
            inside = model(input_ids=IDS, labels=IDS)
    assert torch.equal(before.logits, inside.logits)
    assert torch.equal(before.loss, inside.loss)
    assert "forward" not in vars(model.get_base_model())
    assert "forward" not in vars(find_decoder(model))
    assert len(find_decoder(model)._forward_hooks) == 1  # the streams'


@pytest.fixture
def world(tmp_path: Any) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.usefixtures("world")
def test_a_model_that_ddp_wraps(all_weights: bool) -> None:
    model: Any = stream_model(init="random")
    if all_weights:
        free_weights(model.get_base_model())
    expected = gradients(model, plain(model, NESTED))
    wrapped = DistributedDataParallel(model)
    reduced: list[int] = []

    def reduce(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, reduce)
    with OutputHead(model) as head:
        found = gradients(model, head.log_probs(NESTED, IDS, LABELS, through=wrapped))
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert sum(reduced) == sum(x.numel() for x in expected.values())
