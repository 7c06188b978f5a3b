"""One key-value cache for all streams.

Dimensions: B batch, P streams, H key-value heads, S sequence, D size of a head. Streams are
batch-major: row `b * P + i` is stream i of sequence b.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .active import ActiveStreams
from .errors import CacheError

# Before transformers 5.21 models read recurrent states past the cache: there they keep batch B*P,
# and beam search on hybrids does not work.
_STATES_ARE_FOLDED = hasattr(Cache, "get_conv_state")
# Layers of a cache that are nothing but keys and values, so that fewer streams are a slice.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class StreamCache(Cache):
    """What the decoder sees of a cache: batch B*P over a cache that holds batch B with P*H heads.

    The streams are extra key-value heads of an ordinary cache, so that beam search, cropping and
    static caches work on it as on any other, and fewer streams are a slice of it.
    """

    def __init__(self, cache: Cache, num_streams: int) -> None:
        self.cache = cache
        self.num_streams = num_streams
        self._change_positions(lambda x: x.repeat_interleave(self.num_streams, dim=1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def close(self) -> None:
        """Leave the cache with batch B everywhere, when the decoder is done with it."""
        self._change_positions(lambda x: x[:, :: self.num_streams])

    def _change_positions(self, change: Callable[[Tensor], Tensor]) -> None:
        """Qwen4-Exp keeps position ids [3, B, S] in its layers, the same for all streams."""
        for layer in self.cache.layers:
            if getattr(layer, "indexer_position_ids", None) is not None:
                layer.indexer_position_ids = change(layer.indexer_position_ids)

    def _fold(self, x: Tensor) -> Tensor:  # [B*P, H, ...] -> [B, P*H, ...]
        return x.reshape(-1, self.num_streams * x.shape[1], *x.shape[2:])

    def _unfold(self, x: Tensor) -> Tensor:  # [B, P*H, ...] -> [B*P, H, ...]
        return x.reshape(-1, x.shape[1] // self.num_streams, *x.shape[2:])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B*P, H, S, D]` of a layer; return all of the layer's."""
        keys, values = self.cache.update(
            self._fold(key_states), self._fold(value_states), layer_idx, *args, **kwargs
        )
        return self._unfold(keys), self._unfold(values)

    # What recurrent layers and sparse attention keep is folded in the same way: channels of a
    # convolution, heads of a recurrent state, channels of an indexer's keys.

    def _fold_state(self, x: Tensor) -> Tensor:
        return self._fold(x) if _STATES_ARE_FOLDED else x

    def _unfold_state(self, x: Any) -> Any:  # None where there is no state yet
        return self._unfold(x) if _STATES_ARE_FOLDED and x is not None else x

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self._unfold_state(self.cache.get_conv_state(*args, **kwargs))

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        folded = self._fold_state(conv_states)
        return self._unfold_state(self.cache.update_conv_state(folded, *args, **kwargs))

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self._unfold_state(self.cache.get_recurrent_state(*args, **kwargs))

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        folded = self._fold_state(recurrent_states)
        return self._unfold_state(self.cache.update_recurrent_state(folded, *args, **kwargs))

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Append keys `[B*P, S, D]` of an indexer; return all of the layer's."""
        folded = self._fold(indexer_key_states.transpose(1, 2)).transpose(1, 2)  # [B, S, P*D]
        keys = self.cache.update_indexer(folded, *args, **kwargs)
        return self._unfold(keys.transpose(1, 2)).transpose(1, 2)


def shrink_cache(cache: Cache, p: int) -> None:
    """Keep the first `p` streams of a cache that was filled by a nested family, in place.

    The memory of the others is free afterwards.

    Args:
        cache: A cache of P*H key-value heads from `model(...)` or `model.generate(...)`.
        p: Streams to keep, at least 2 and at most the cache's.

    Raises:
        CacheError: The cache holds fewer streams, or `p` is 1: the backbone's keys and values are
            none of the streams'. Or it holds more than keys and values, such as the states of
            linear attention.
    """
    have = getattr(cache, "num_streams", 1)
    other = {type(layer).__name__ for layer in cache.layers if type(layer) not in _PLAIN_LAYERS}
    if other:
        raise CacheError(
            "A cache can be cut where its layers hold plain keys and values, got "
            f"{', '.join(sorted(other))}. Start with a new cache."
        )
    if not 2 <= p <= have:
        raise CacheError(
            f"A cache can be cut to 2 streams or more, up to its own number of {have}, got p={p}. "
            "For the backbone (P = 1) start with a new cache."
        )
    for layer in cache.layers if p < have else ():
        if layer.keys is not None:  # filled; a view would hold on to all streams
            heads = layer.keys.shape[1] * p // have
            _replace(layer, layer.keys[:, :heads].clone(), layer.values[:, :heads].clone())
    cache.num_streams = p


def join_caches(cache: Cache, more: Cache) -> None:
    """Put further streams behind those of a cache, in place.

    Args:
        cache: For which `is_plain` holds.
        more: A cache of the same kind, which other streams filled with the same tokens.
    """
    for layer, other in zip(cache.layers, more.layers, strict=True):
        if layer.keys is not None:
            keys = torch.cat([layer.keys, other.keys.to(layer.keys)], dim=1)
            _replace(layer, keys, torch.cat([layer.values, other.values.to(layer.values)], dim=1))
    cache.num_streams += more.num_streams


def lengthen_cache(cache: StaticCache, config: PreTrainedConfig, length: int) -> None:
    """Give a static cache room for `length` tokens, in place; what it holds stays.

    Args:
        cache: With layers that are not yet full.
        config: Of the decoder.
        length: In tokens. Layers of a sliding window are as long as that at most.
    """
    longer = StaticCache(config, max_cache_len=length)
    for layer, target in zip(cache.layers, longer.layers, strict=True):
        room = getattr(target, "max_cache_len", 0) - getattr(layer, "max_cache_len", 0)
        if room > 0:
            layer.max_cache_len = target.max_cache_len
            if layer.is_initialized:
                pad = (0, 0, 0, room)
                _replace(layer, F.pad(layer.keys, pad), F.pad(layer.values, pad))


def is_plain(cache: Cache) -> bool:
    """Whether a cache holds nothing but keys and values, so that streams can be cut off and added.

    Not while sliding windows keep more than their window, to go back a few tokens.
    """
    return all(
        type(layer) in _PLAIN_LAYERS and not getattr(layer, "record_past", False)
        for layer in cache.layers
    )


def _replace(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.keys, layer.values = keys, values
    if isinstance(layer, StaticLayer):  # as where transformers allocates them, for CUDA graphs
        layer.num_heads = keys.shape[1]
        torch._dynamo.mark_static_address(keys)
        torch._dynamo.mark_static_address(values)


def claim_cache(cache: Cache, active: ActiveStreams | None) -> None:
    """Let a cache belong to the streams in use (None: the backbone).

    An empty cache is anybody's: also one that was allocated before its first use, for another
    number of heads, or emptied and used again.

    Raises:
        CacheError: Others filled it.
    """
    if active is not None and not hasattr(cache, "layers"):
        raise CacheError(
            "Streams take a cache with layers, such as DynamicCache or StaticCache, got a "
            f"{type(cache).__name__}. Start with a new cache."
        )
    p, adapter = (1, None) if active is None else (active.num_streams, active.adapter)
    have, filled_by = getattr(cache, "num_streams", 1), getattr(cache, "adapter", None)
    if (have, filled_by) != (p, adapter):
        if _is_filled(cache):
            raise _foreign(have, filled_by, p, adapter)
        _deallocate(cache)
    if isinstance(cache, Cache):
        cache.num_streams, cache.adapter = p, adapter


def _is_filled(cache: Cache) -> bool:
    layers = getattr(cache, "layers", ())
    if any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers):
        return True
    allocated = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    return bool(allocated) and _hold_tokens(allocated)


@torch.compiler.disable  # the length of a static layer is a tensor, which a graph cannot look at
def _hold_tokens(layers: list[Any]) -> bool:
    return any(int(layer.get_seq_length()) > 0 for layer in layers)


def _deallocate(cache: Cache) -> None:
    """Let an empty cache be allocated anew at its first use, for the streams of that moment."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "keys", None) is not None:
            layer.is_initialized = False
        for states in ("conv", "recurrent"):
            name = f"is_{states}_states_initialized"
            if hasattr(layer, name):
                setattr(layer, name, dict.fromkeys(getattr(layer, name), False))
        if hasattr(layer, "is_indexer_initialized"):
            layer.is_indexer_initialized = False


def _foreign(have: int, filled_by: str | None, p: int, adapter: str | None) -> CacheError:
    if have != p:
        return CacheError(
            f"The cache was filled with P = {have}, but P = {p} is in use. Go on with P = {have}, "
            "start with a new cache, or change what generate returned with "
            "recycle.change_p(model, output, p)."
        )
    names = [f"adapter {x!r}" if x else "the backbone alone" for x in (filled_by, adapter)]
    return CacheError(
        f"The cache was filled with {names[0]}, but {names[1]} is in use. Start with a new cache."
    )
