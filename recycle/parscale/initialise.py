"""Where a model's attention is, and text and random starts of its prefixes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .aggregator import Aggregator
from .config import ParScaleConfig
from .prefix import PREFIX_CHILD, forward_state
from .streams import STREAMS_CHILD, choose_streams


class UnsupportedModelError(ValueError):
    """The model has no attention that a prefix could enter."""


@torch.no_grad()
def _record(
    model: nn.Module, token_ids: Tensor, position_ids: Tensor | None
) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Run the backbone's decoder on tokens [B, S]; give each attention module's keys and values, and the output."""
    decoder = model.get_decoder()
    recorded: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, key: Tensor, value: Tensor) -> None:
        recorded.setdefault(module, (key, value))

    inputs: dict[str, Any] = {"input_ids": token_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    was_training = decoder.training
    decoder.eval()
    forward_state.record = record
    try:
        if STREAMS_CHILD in decoder._modules:
            with choose_streams(decoder.get_submodule(STREAMS_CHILD), None):  # type: ignore
                output = decoder(**inputs)
        else:
            output = decoder(**inputs)
    finally:
        forward_state.record = None
        decoder.train(was_training)
    return recorded, output[0]


def locate_attention(model: nn.Module, config: ParScaleConfig) -> None:
    """Find the decoder and its attention modules with a two-token forward pass and write them into `config`.

    Raises:
        UnsupportedModelError: No module calls transformers' attention interface.
    """
    decoder = model.get_decoder()
    device = next(decoder.parameters()).device
    if device.type == "meta":
        raise UnsupportedModelError(
            "The backbone lies on the meta device, so its attention cannot be found by running it. "
            "Load its weights first, or pass a config that has attention_shapes."
        )
    recorded, output = _record(model, torch.tensor([[0, 1]], device=device), None)
    names = {module: name for name, module in model.named_modules()}
    config.decoder = names[decoder]
    config.hidden_size = output.shape[-1]
    config.attention_shapes = {
        names[module]: [key.shape[1], key.shape[-1], value.shape[-1]]
        for module, (key, value) in recorded.items()
    }
    if not config.attention_shapes:
        raise UnsupportedModelError(
            f"Streams need attention that goes through transformers' AttentionInterface; {type(model).__name__} "
            f"(model type {model.config.model_type!r}) has none. Supported are decoders with attention layers, such as "
            "Llama, Qwen, Mistral, Gemma, Phi or GPT-2."
        )


def start_from_text(
    model: nn.Module, token_ids: Sequence[Sequence[int]] | Tensor, adapter: str = "default"
) -> None:
    """Start stream i of an adapter from the keys and values that the backbone computes on text i.

    The text is placed at positions -n to -1, so that the text the model reads later still starts at 0; backbones
    with learned absolute positions use 0 to n-1. The aggregator's last layers are set to zero: uniform weights.

    Args:
        model: A PEFT model, or a causal LM with an injected adapter.
        token_ids: `[P, n]` token ids, one text for each stream.
        adapter: The adapter's name.
    """
    decoder = model.get_decoder()
    tokens = torch.as_tensor(token_ids, device=next(decoder.parameters()).device)
    n = tokens.shape[1]
    positions = None
    if getattr(decoder.config, "rope_parameters", None) is not None:
        positions = torch.arange(-n, 0, device=tokens.device).unsqueeze(0)
    recorded, _ = _record(model, tokens, positions)
    for module, (key, value) in recorded.items():
        prefix = module._modules.get(PREFIX_CHILD)
        if prefix is None:
            continue
        for dictionary, start in ((prefix.parscale_keys, key), (prefix.parscale_values, value)):
            parameter = dictionary[adapter]  # type: ignore[index]
            if parameter.shape != start.shape:
                raise ValueError(
                    f"A text start takes token ids [num_streams, num_virtual_tokens]; adapter {adapter!r} "
                    f"has {parameter.shape[0]} streams of {parameter.shape[2]} tokens, got {tuple(tokens.shape)}."
                )
            parameter.data.copy_(start)
    aggregator = decoder.get_submodule(STREAMS_CHILD).parscale_aggregator[adapter]  # type: ignore
    assert isinstance(aggregator, Aggregator)
    aggregator.start_uniform()
