"""Where a model's attention is, found by running it."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .active import choose, this_thread
from .config import ParScaleConfig
from .decoder import eval_mode, find_decoder
from .errors import UnsupportedModelError
from .fallback import REFUSED, Extend, intercept, is_handmade
from .streams import find_streams


@torch.no_grad()
def record_attention(
    model: PreTrainedModel, token_ids: Tensor, **inputs: Any
) -> tuple[dict[nn.Module, list[tuple[Tensor, Tensor]]], Tensor]:
    """Run the backbone's decoder on tokens [B, S], and on what other inputs it is to have.

    Returns the keys and values of each call of each attention module, and the decoder's output.
    """
    decoder, streams = find_decoder(model), find_streams(model)
    recorded: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def record(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        recorded.setdefault(module, []).append((key, value))
        return key, value

    def record_handmade(module: nn.Module) -> tuple[Extend, int]:
        return partial(record, module), 0

    hooks = [intercept(m, record_handmade) for m in decoder.modules() if is_handmade(m)]
    bare = nullcontext() if streams is None else choose(streams.selection, None)
    this_thread.forward.record = record
    try:
        with eval_mode(decoder), bare:
            output = decoder(input_ids=token_ids, use_cache=False, **inputs)
    finally:
        this_thread.forward.record = None
        for hook in hooks:
            hook.remove()
    return recorded, output[0]


def locate_attention(model: PreTrainedModel, config: ParScaleConfig) -> None:
    """Find the decoder and its attention with a two-token pass and write them into `config`.

    A config that has them already, from an adapter on disk or an earlier model, is compared.

    Raises:
        UnsupportedModelError: No module calls transformers' attention interface, the decoder is no
            module of its own, or `config` belongs to a model of another shape.
    """
    decoder = find_decoder(model)
    device = next(decoder.parameters()).device
    if device.type == "meta":
        if config.attention_shapes is not None:
            return
        raise UnsupportedModelError(
            "The backbone lies on the meta device, so its attention cannot be found by running it. "
            "Load its weights first, or pass a config that has attention_shapes."
        )
    recorded, output = record_attention(model, torch.tensor([[0, 1]], device=device))
    names = {module: name for name, module in model.named_modules()}
    name = type(model).__name__
    shapes = {
        names[module]: [key.shape[1], key.shape[-1], value.shape[-1]]
        for module, ((key, value), *_) in recorded.items()
    }
    if not shapes:
        raise UnsupportedModelError(
            f"Streams enter a model through the keys and values of its attention; {name} (model "
            f"type {model.config.model_type!r}) {_why_no_attention(model)}. Supported are decoders "
            "with attention layers, such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2."
        )
    found = {"decoder": names[decoder], "hidden_size": output.shape[-1], "attention_shapes": shapes}
    for field, value in found.items():
        expected = getattr(config, field)
        if expected is not None and expected != value:
            raise UnsupportedModelError(
                f"An adapter fits one shape of backbone: its config has {field}={_brief(expected)},"
                f" and this {name} has {_brief(value)}. Take the backbone it was made for, or a "
                "new ParScaleConfig."
            )
        setattr(config, field, value)


def _why_no_attention(model: PreTrainedModel) -> str:
    if model._is_stateful:
        return "has none: its layers are recurrent"
    reasons = {REFUSED[name] for m in model.modules() if (name := type(m).__name__) in REFUSED}
    return "computes attention by hand, past transformers' AttentionInterface, " + (
        " and ".join(sorted(reasons)) or "in a way that is not known to take prefixes"
    )


def _brief(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    shapes = sorted({tuple(shape) for shape in value.values()})
    return f"{len(value)} attention modules ({next(iter(value))}, …) of [H, Dk, Dv] {shapes}"
