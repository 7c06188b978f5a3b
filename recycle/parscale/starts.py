"""Text and random starts of the streams."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .aggregator import Aggregator
from .decoder import find_decoder
from .errors import ParScaleError, UnsupportedModelError
from .location import record_attention
from .prefix import StreamPrefix
from .streams import streams_of


def start_token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], num_virtual_tokens: int
) -> list[list[int]]:
    """The first `num_virtual_tokens` tokens of each text, after the tokenizer's start token if any.

    Args:
        tokenizer: The backbone's tokenizer.
        texts: One text for each stream.
        num_virtual_tokens: Prefix tokens n of every stream.

    Raises:
        ParScaleError: A text is shorter than that.
    """
    token_ids = [tokenizer(text)["input_ids"] for text in texts]
    for number, ids in enumerate(token_ids):
        if len(ids) < num_virtual_tokens:
            raise ParScaleError(
                f"A start text needs at least num_virtual_tokens={num_virtual_tokens} tokens, and "
                f"text {number} has {len(ids)}: {texts[number][:40]!r}. Take a longer text."
            )
    return [ids[:num_virtual_tokens] for ids in token_ids]


def start_from_text(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]] | Tensor, adapter: str = "default"
) -> None:
    """Start stream i of an adapter from the keys and values that the backbone computes on text i.

    The text is placed at positions -n to -1, so that the text the model reads later still starts at
    0; backbones that have no positions before 0 use 0 to n-1. The aggregator's last layers are set
    to zero: uniform weights.

    Args:
        model: A PEFT model, or a causal LM with an injected adapter.
        token_ids: `[P, n]` token ids, one text for each stream.
        adapter: The adapter's name.

    Raises:
        ParScaleError: `token_ids` are of another shape than the adapter, or not the model's.
        UnsupportedModelError: What the model computes on a text depends on more than relative
            positions, or is not one pair of keys and values for each attention module.
    """
    start_from(model, text_start(model, token_ids), adapter)


def text_start(
    model: PreTrainedModel, token_ids: Sequence[Sequence[int]] | Tensor
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Keys `[P, H, n, Dk]` and values `[P, H, n, Dv]` of texts `[P, n]` in each attention module.

    Raises as `start_from_text` does.
    """
    size, tokens = model.get_input_embeddings().num_embeddings, torch.as_tensor(token_ids)
    if tokens.min() < 0 or tokens.max() >= size:
        raise ParScaleError(
            f"start_token_ids lie between 0 and {size - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}. Take them from the backbone's own tokenizer."
        )
    decoder = find_decoder(model)
    tokens = tokens.to(next(decoder.parameters()).device)
    rope = getattr(decoder.config, "rope_parameters", None)
    if "llama_4_scaling_beta" in (rope or {}):
        raise _no_text_start(model, "its attention is scaled by a token's position")
    positions = {}
    if rope is not None:
        positions["position_ids"] = torch.arange(-tokens.shape[1], 0, device=tokens.device)[None]
    recorded, _ = record_attention(model, tokens, **positions)
    for (key, value), *again in recorded.values():
        if any(not torch.equal(key, k) or not torch.equal(value, v) for k, v in again):
            raise _no_text_start(model, "a module attends to more than one pair of keys and values")
        if not (torch.isfinite(key).all() and torch.isfinite(value).all()):
            raise _no_text_start(model, f"keys and values on it are not finite in {key.dtype}")
    return {module: calls[0] for module, calls in recorded.items()}


def _no_text_start(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Streams of model type {model.config.model_type!r} cannot start from text: {reason}. "
        "Choose init='random'."
    )


def start_from(
    model: PreTrainedModel, start: dict[nn.Module, tuple[Tensor, Tensor]], adapter: str
) -> None:
    """Set an adapter's prefixes to what `text_start` gives, and its aggregators to the mean."""
    for module, (keys, values) in start.items():
        prefix = module._modules[StreamPrefix.child_name]
        assert isinstance(prefix, StreamPrefix)
        parameters = prefix.parscale_keys[adapter], prefix.parscale_values[adapter]
        for parameter, tensor in zip(parameters, (keys, values), strict=True):
            if parameter.shape != tensor.shape:
                raise ParScaleError(
                    "A text start takes token ids [num_streams, num_virtual_tokens]; adapter "
                    f"{adapter!r} has {parameter.shape[0]} streams of {parameter.shape[2]} tokens, "
                    f"got {(tensor.shape[0], tensor.shape[2])}."
                )
            parameter.data.copy_(tensor)
    aggregator = streams_of(model).parscale_aggregator[adapter]
    assert isinstance(aggregator, Aggregator)
    aggregator.start_uniform()
