"""Where a model's attention is, and text and random starts of its prefixes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .aggregator import Aggregator
from .config import ParScaleConfig
from .prefix import PREFIX_CHILD, StreamPrefix, forward_state
from .streams import STREAMS_CHILD, DecoderStreams, choose_streams


class UnsupportedModelError(ValueError):
    """The model has no attention that a prefix could enter."""


@torch.no_grad()
def _record(
    model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor | None
) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Run the backbone's decoder on tokens [B, S].

    Returns each attention module's keys and values, and the decoder's output.
    """
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
    streams = decoder._modules.get(STREAMS_CHILD)
    try:
        with nullcontext() if streams is None else choose_streams(streams, None):
            output = decoder(**inputs)
    finally:
        forward_state.record = None
        decoder.train(was_training)
    return recorded, output[0]


def locate_attention(model: PreTrainedModel, config: ParScaleConfig) -> None:
    """Find the decoder and its attention with a two-token pass and write them into `config`.

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
            "Streams need attention that goes through transformers' AttentionInterface; "
            f"{type(model).__name__} (model type {model.config.model_type!r}) has none. Supported "
            "are decoders with attention layers, such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2."
        )


def start_token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], num_virtual_tokens: int
) -> list[list[int]]:
    """The first `num_virtual_tokens` tokens of each text, after the tokenizer's start token if any.

    Args:
        tokenizer: The backbone's tokenizer.
        texts: One text for each stream.
        num_virtual_tokens: Prefix tokens n of every stream.

    Raises:
        ValueError: A text is shorter than that.
    """
    token_ids = [tokenizer(text)["input_ids"] for text in texts]
    for number, ids in enumerate(token_ids):
        if len(ids) < num_virtual_tokens:
            raise ValueError(
                f"A start text needs at least num_virtual_tokens={num_virtual_tokens} tokens, and "
                f"text {number} has {len(ids)}: {texts[number][:40]!r}. Take a longer text."
            )
    return [ids[:num_virtual_tokens] for ids in token_ids]


def check_token_ids(model: PreTrainedModel, token_ids: Sequence[Sequence[int]] | Tensor) -> None:
    """Raise `ValueError` where a start text has tokens that the model does not know."""
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.as_tensor(token_ids)
    if tokens.min() < 0 or tokens.max() >= size:
        raise ValueError(
            f"start_token_ids lie between 0 and {size - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}. Take them from the backbone's own tokenizer."
        )


def start_from_text(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]] | Tensor, adapter: str = "default"
) -> None:
    """Start stream i of an adapter from the keys and values that the backbone computes on text i.

    The text is placed at positions -n to -1, so that the text the model reads later still starts at
    0; backbones with learned absolute positions use 0 to n-1. The aggregator's last layers are set
    to zero: uniform weights.

    Args:
        model: A PEFT model, or a causal LM with an injected adapter.
        token_ids: `[P, n]` token ids, one text for each stream.
        adapter: The adapter's name.

    Raises:
        ValueError: `token_ids` are of another shape than the adapter, or not the model's.
    """
    check_token_ids(model, token_ids)
    decoder = model.get_decoder()
    tokens = torch.as_tensor(token_ids, device=next(decoder.parameters()).device)
    n = tokens.shape[1]
    positions = None
    if getattr(decoder.config, "rope_parameters", None) is not None:
        positions = torch.arange(-n, 0, device=tokens.device).unsqueeze(0)
    recorded, _ = _record(model, tokens, positions)
    for module, (key, value) in recorded.items():
        prefix = module._modules.get(PREFIX_CHILD)
        if not isinstance(prefix, StreamPrefix):
            continue
        for dictionary, start in ((prefix.parscale_keys, key), (prefix.parscale_values, value)):
            parameter = dictionary[adapter]
            if parameter.shape != start.shape:
                raise ValueError(
                    "A text start takes token ids [num_streams, num_virtual_tokens]; adapter "
                    f"{adapter!r} has {parameter.shape[0]} streams of {parameter.shape[2]} tokens, "
                    f"got {tuple(tokens.shape)}."
                )
            parameter.data.copy_(start)
    streams = decoder._modules[STREAMS_CHILD]
    assert isinstance(streams, DecoderStreams)
    aggregator = streams.parscale_aggregator[adapter]
    assert isinstance(aggregator, Aggregator)
    aggregator.start_uniform()
