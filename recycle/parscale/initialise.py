"""Where a model's attention is, and text and random starts of its prefixes."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recycle.errors import RecycleError

from .aggregator import Aggregator
from .config import ParScaleConfig
from .fallback import REFUSED, Extend, intercept, is_handmade
from .prefix import PREFIX_CHILD, StreamPrefix, forward_state
from .streams import STREAMS_CHILD, DecoderStreams, choose_streams


class UnsupportedModelError(RecycleError):
    """The model has no attention that these prefixes, or this start of them, could enter."""


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The decoder of a causal LM, the part before its output head.

    Raises:
        UnsupportedModelError: There is none, as a module of its own.
    """
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = causal_lm.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # a head of that name
        decoder = causal_lm
    while decoder.get_output_embeddings() is not None:
        below = [child for child in decoder.children() if isinstance(child, PreTrainedModel)]
        if len(below) != 1:
            raise UnsupportedModelError(
                "Streams enter a decoder below the causal LM, before its output head; "
                f"{type(causal_lm).__name__} (model type {causal_lm.config.model_type!r}) has "
                f"{len(below)} models below {type(decoder).__name__}, and one is expected."
            )
        decoder = below[0]
    return decoder


@torch.no_grad()
def _record(
    model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor | None
) -> tuple[dict[nn.Module, list[tuple[Tensor, Tensor]]], Tensor]:
    """Run the backbone's decoder on tokens [B, S].

    Returns the keys and values of each call of each attention module, and the decoder's output.
    """
    decoder = find_decoder(model)
    recorded: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def record(module: nn.Module, key: Tensor, value: Tensor) -> None:
        recorded.setdefault(module, []).append((key, value))

    inputs: dict[str, Any] = {"input_ids": token_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    hooks = [intercept(module, _recorder) for module in decoder.modules() if is_handmade(module)]
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    forward_state.record = record
    streams = decoder._modules.get(STREAMS_CHILD)
    try:
        with nullcontext() if streams is None else choose_streams(streams, None):
            output = decoder(**inputs)
    finally:
        forward_state.record = None
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return recorded, output[0]


def _recorder(module: nn.Module) -> tuple[Extend, int] | None:
    record = forward_state.record
    if record is None:
        return None

    def extend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        record(module, key, value)
        return key, value

    return extend, 0


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
    recorded, output = _record(model, torch.tensor([[0, 1]], device=device), None)
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
    0; backbones that have no positions before 0 use 0 to n-1. The aggregator's last layers are set
    to zero: uniform weights.

    Args:
        model: A PEFT model, or a causal LM with an injected adapter.
        token_ids: `[P, n]` token ids, one text for each stream.
        adapter: The adapter's name.

    Raises:
        ValueError: `token_ids` are of another shape than the adapter, or not the model's.
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
    check_token_ids(model, token_ids)
    decoder = find_decoder(model)
    tokens = torch.as_tensor(token_ids, device=next(decoder.parameters()).device)
    rope = getattr(decoder.config, "rope_parameters", None)
    positions = None
    if rope is not None:
        positions = torch.arange(-tokens.shape[1], 0, device=tokens.device).unsqueeze(0)
    if rope is not None and "llama_4_scaling_beta" in rope:
        raise _no_text_start(model, "its attention is scaled by a token's position")
    recorded, _ = _record(model, tokens, positions)
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
    for module, tensors in start.items():
        prefix = module._modules[PREFIX_CHILD]
        assert isinstance(prefix, StreamPrefix)
        for dictionary, tensor in zip(
            (prefix.parscale_keys, prefix.parscale_values), tensors, strict=True
        ):
            parameter = dictionary[adapter]
            if parameter.shape != tensor.shape:
                raise ValueError(
                    "A text start takes token ids [num_streams, num_virtual_tokens]; adapter "
                    f"{adapter!r} has {parameter.shape[0]} streams of {parameter.shape[2]} tokens, "
                    f"got {(tensor.shape[0], tensor.shape[2])}."
                )
            parameter.data.copy_(tensor)
    streams = find_decoder(model)._modules[STREAMS_CHILD]
    assert isinstance(streams, DecoderStreams)
    aggregator = streams.parscale_aggregator[adapter]
    assert isinstance(aggregator, Aggregator)
    aggregator.start_uniform()


def streams_of(model: nn.Module) -> DecoderStreams:
    """The streams around the decoder of a model with ParScale adapters."""
    layer = find_decoder(model).get_submodule(STREAMS_CHILD)
    assert isinstance(layer, DecoderStreams)
    return layer
