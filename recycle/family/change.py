"""Another P in mid-generation: streams cut off from a cache, or computed into it.

Dimensions: B sequences, S tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput

from recycle.parscale import CacheError, choose_streams, find_decoder, shrink_cache, streams_of
from recycle.parscale.cache import is_plain, join_caches

from .switch import use_p


def change_p(model: nn.Module, output: Any, p: int, attention_mask: Tensor | None = None) -> Any:
    """Make what `generate` returned one that P = `p` goes on with.

    It changes the cache only, in place. Say `set_p(model, p)` or `use_p(model, p)` as well before
    you go on: `model.generate(output.sequences, past_key_values=output.past_key_values)`.

    Going down within a nested family keeps the first streams as they are and frees the others'
    memory. Going up computes only the missing streams. From or to P = 1, between adapters that were
    trained apart, and in models that keep more than keys and values (hybrids), all tokens are
    computed anew. Either takes one pass, as a prefill does.

    Args:
        model: As for `set_p`.
        output: Of `generate(..., return_dict_in_generate=True)`: `sequences` [B, S] and
            `past_key_values`, a `DynamicCache` or `StaticCache` of fewer tokens than S, or S.
        p: One of `available_p(model)`.
        attention_mask: That of the prompt or of more, if the prompt was padded. The tokens after
            it count.

    Returns:
        `output`.

    Raises:
        FamilyError: The family does not offer `p`.
        CacheError: There is no such cache, it is that of beams, or `sequences` are too short.
    """
    if isinstance(output, Tensor):
        raise CacheError(
            "P changes in what generate returns with its cache, got a tensor of tokens. Generate "
            "with return_dict_in_generate=True."
        )
    cache, sequences = output.past_key_values, output.sequences
    if isinstance(output, GenerateBeamDecoderOnlyOutput):
        raise CacheError(
            "P cannot change after beam search, whose cache holds the beams and not the sequences "
            "it returned. Use num_beams=1, or start with a new cache."
        )
    length = 0 if cache is None else int(cache.get_seq_length())
    if not 0 < length <= sequences.shape[1]:
        raise CacheError(
            f"P changes in a cache of 1 to {sequences.shape[1]} tokens, since sequences have "
            f"{sequences.shape[1]}; got {'none' if cache is None else length}. Generate with "
            "use_cache=True, and give all of its tokens as sequences."
        )
    change_cache(model, cache, sequences[:, :length], p, attention_mask)
    return output


@torch.no_grad()
def change_cache(
    model: nn.Module, cache: Cache, token_ids: Tensor, p: int, attention_mask: Tensor | None
) -> None:
    """Let a cache that holds `token_ids` [B, S] be that of P = `p`, in place. See `change_p`."""
    streams, decoder = streams_of(model), find_decoder(model)
    with use_p(model, p):
        wanted = streams.selection.current()
    adapter = wanted.adapter if wanted else None
    have, filled_by = getattr(cache, "num_streams", 1), getattr(cache, "adapter", None)
    if (have, filled_by) == (p, adapter):
        return
    missing, nested = wanted, filled_by == adapter and is_plain(cache)
    if wanted is not None and nested:
        if p < have:
            return shrink_cache(cache, p)
        # Their final hidden states are not merged: only what they leave in the cache is used.
        missing = replace(wanted, first=have, num_streams=p - have, p_values=(), apart=True)
    new = _empty(cache, decoder.config)
    inputs = {"input_ids": token_ids, "past_key_values": new, "use_cache": True}
    if attention_mask is not None:
        inputs["attention_mask"] = _extend(attention_mask, *token_ids.shape)
        streams.count_positions(inputs, token_ids.shape[1])
    with choose_streams(streams, missing):
        decoder(**inputs)
    if missing is not wanted:
        return join_caches(cache, new)
    cache.layers, cache.num_streams, cache.adapter = new.layers, p, adapter


def _empty(cache: Cache, config: PreTrainedConfig) -> Any:
    """An empty cache of the same kind."""
    if type(cache) is StaticCache:
        lengths = (getattr(layer, "max_cache_len", 0) for layer in cache.layers)
        return StaticCache(config, max_cache_len=max(lengths))
    if type(cache) is DynamicCache:  # without a configuration it takes windows for full attention
        return DynamicCache(config=None if cache.layer_class_to_replicate else config)
    raise CacheError(
        "P changes in a DynamicCache or StaticCache, got "
        f"{type(cache).__name__}. Start with a new cache."
    )


def _extend(mask: Tensor, batch: int, length: int) -> Tensor:
    """A mask [B, S] for sequences that may be several for a prompt, and longer or shorter."""
    mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)[:, :length]
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
