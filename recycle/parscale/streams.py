"""Replicate before the decoder, aggregate after it, one cache for all streams.

Dimensions: B batch, P streams, H key-value heads, S sequence, D hidden size. Streams are
batch-major: row `b * P + i` is stream i of sequence b, so everything outside the decoder sees
batch B.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .aggregator import Aggregator
from .prefix import ActiveStreams, StreamLayer, forward_state

STREAMS_CHILD = "streams"
SUPPORTED_ATTENTION = ("sdpa", "eager")
# Layers of a cache that are nothing but keys and values, so that fewer streams are a slice.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class CacheError(ValueError):
    """A key-value cache was filled with another number of streams than the one in use."""


class StreamCache(Cache):
    """What the decoder sees of a cache: batch B*P over a cache that holds batch B with P*H heads.

    The streams are extra key-value heads of an ordinary cache, so that beam search, cropping and
    static caches work on it as on any other, and fewer streams are a slice of it.
    """

    def __init__(self, cache: Cache, streams: ActiveStreams) -> None:
        self.cache = cache
        self.num_streams = streams.num_streams
        cache.num_streams, cache.adapter = streams.num_streams, streams.adapter
        self._change_positions(lambda x: x.repeat_interleave(self.num_streams, dim=1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def close(self) -> Cache:
        """The cache itself, when the decoder is done with it."""
        self._change_positions(lambda x: x[:, :: self.num_streams])
        return self.cache

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

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        state = self.cache.get_conv_state(*args, **kwargs)
        return None if state is None else self._unfold(state)

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._unfold(self.cache.update_conv_state(self._fold(conv_states), *args, **kwargs))

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        state = self.cache.get_recurrent_state(*args, **kwargs)
        return None if state is None else self._unfold(state)

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._unfold(
            self.cache.update_recurrent_state(self._fold(recurrent_states), *args, **kwargs)
        )

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Append keys `[B*P, S, D]` of an indexer; return all of the layer's."""
        folded = self._fold(indexer_key_states.transpose(1, 2)).transpose(1, 2)  # [B, S, P*D]
        keys = self.cache.update_indexer(folded, *args, **kwargs)
        return self._unfold(keys.transpose(1, 2)).transpose(1, 2)


def shrink_cache(cache: Cache, p: int) -> None:
    """Keep the first `p` streams of a cache that was filled by a nested family, in place.

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
    for layer in cache.layers:
        if layer.keys is not None:  # filled
            layer.keys = layer.keys[:, : layer.keys.shape[1] * p // have]
            layer.values = layer.values[:, : layer.values.shape[1] * p // have]
    cache.num_streams = p


def _check_cache(cache: Cache | None, streams: ActiveStreams | None) -> None:
    if cache is None:
        return
    if streams is not None and not hasattr(cache, "layers"):
        raise CacheError(
            "Streams take a cache with layers, such as DynamicCache or StaticCache, got a "
            f"{type(cache).__name__}. Start with a new cache."
        )
    p, adapter = (1, None) if streams is None else (streams.num_streams, streams.adapter)
    have, filled_by = getattr(cache, "num_streams", 1), getattr(cache, "adapter", None)
    layers = getattr(cache, "layers", ())
    filled = any(getattr(layer, "keys", None) is not None for layer in layers)
    if filled and have != p:
        raise CacheError(
            f"The cache was filled with P = {have}, but P = {p} is in use. Go on with P = {have}, "
            "start with a new cache, or, to go down within a nested family, cut it with "
            "recycle.parscale.shrink_cache(cache, p)."
        )
    if filled and filled_by != adapter:
        names = [f"adapter {x!r}" if x else "the backbone alone" for x in (filled_by, adapter)]
        raise CacheError(
            f"The cache was filled with {names[0]}, but {names[1]} is in use. Start with a new "
            "cache."
        )


class DecoderStreams(nn.Module, StreamLayer):
    """Child of the decoder: the aggregators, and the two hooks that put the streams around it."""

    adapter_layer_names = ("parscale_aggregator",)

    def __init__(self, decoder: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        StreamLayer.__init__(self)
        self.parscale_aggregator = nn.ModuleDict()
        self.p: dict[str, int] = {}  # the P in use, for each adapter
        self.heads: dict[str, list[int]] = {}
        # RoBERTa and its like count positions themselves, and from 2.
        self._counts_positions = any(
            hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()
        )
        self._argument_names = list(inspect.signature(decoder.forward).parameters)
        self._hooks = [
            decoder.register_forward_pre_hook(self._replicate, with_kwargs=True),
            decoder.register_forward_hook(self._aggregate, with_kwargs=True, always_call=True),
        ]

    def add(
        self,
        adapter: str,
        hidden_size: int,
        heads: list[int],
        smoothing: float,
        device: torch.device,
    ) -> None:
        """Add an adapter's aggregators; its largest P is in use first."""
        self.device = device
        self.parscale_aggregator[adapter] = Aggregator(hidden_size, heads, smoothing, device)
        self.heads[adapter] = list(heads)
        self.p[adapter] = heads[-1]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.heads.pop(adapter_name, None)
        self.p.pop(adapter_name, None)

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    def selection(self) -> ActiveStreams | None:
        """The streams that the next forward pass in this thread uses; None for the backbone."""
        for layer, streams in forward_state.choices:
            if layer is self:
                return streams
        active = [name for name in self.active_adapters if name in self.p]  # not another method's
        if self.disable_adapters or not active:
            return None
        if len(active) > 1:
            raise ValueError(
                f"One ParScale adapter can be active at a time, got {active}. Choose one with "
                "model.set_adapter(name)."
            )
        adapter = active[0]
        return ActiveStreams(adapter, self.p[adapter], (self.p[adapter],))

    def _replicate(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        streams = self.selection()
        p = 1 if streams is None else streams.num_streams
        kwargs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        _check_cache(cache, streams)
        forward_state.streams = None
        if streams is None:
            if isinstance(cache, Cache):
                cache.num_streams, cache.adapter = 1, None
            return None

        implementation = decoder.config._attn_implementation
        if implementation not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"Streams run with attn_implementation {' or '.join(SUPPORTED_ATTENTION)}, got "
                f"{implementation!r}. Load the backbone with attn_implementation='sdpa'."
            )
        text = kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        mask = kwargs.get("attention_mask")
        if (
            not self._counts_positions
            and kwargs.get("position_ids") is None
            and "position_ids" in self._argument_names
            and isinstance(mask, Tensor)
            and mask.ndim == 2
        ):
            kwargs["position_ids"] = _positions(mask, text.shape[1])
        for name, value in kwargs.items():
            kwargs[name] = _replicate_value(name, value, text.shape[0], p)

        use_cache = kwargs.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not _checkpoints(decoder):
            cache = DynamicCache(config=decoder.config)
        if cache is not None:
            kwargs["past_key_values"] = StreamCache(cache, streams)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _carry_streams_into_recomputation(decoder)
        forward_state.streams = streams
        return (), kwargs

    def _aggregate(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        streams, forward_state.streams = forward_state.streams, None
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StreamCache):
            cache.close()
        if streams is None or output is None:
            return None
        hidden = output[0].unflatten(0, (-1, streams.num_streams))  # [B, P, S, D]
        aggregator = self.parscale_aggregator[streams.adapter]
        # Several heads are stacked along the batch: [|heads|*B, S, D], the first head first.
        merged = torch.cat([aggregator(hidden[:, :p]) for p in streams.heads])
        if isinstance(output, tuple):
            return merged, *(x.cache if isinstance(x, StreamCache) else x for x in output[1:])
        output.last_hidden_state = merged
        if isinstance(output.get("past_key_values"), StreamCache):
            output.past_key_values = output.past_key_values.cache
        if output.get("hidden_states") is not None:
            output.hidden_states = (*output.hidden_states[:-1], merged)
        if output.get("router_logits") is not None:
            output.router_logits = tuple(
                part
                for each in output.router_logits
                for part in _by_stream(each, *hidden.shape[:2])
            )
        return output


def _by_stream(router_logits: Tensor, batch: int, p: int) -> Iterator[Tensor]:
    """A layer's router logits `[B*P*S, experts]` as P of `[B*S, experts]`.

    Outside they look like those of more layers, so the balance of experts is that over all streams.
    """
    by_stream = router_logits.view(batch, p, -1, router_logits.shape[-1])
    yield from (part.flatten(0, 1) for part in by_stream.unbind(1))


def _positions(mask: Tensor, length: int) -> Tensor:
    """Positions `[B, S]` of the last tokens of a mask `[B, K]`, counted without padding.

    A prefix carries no rotary embedding, so other than in the backbone it matters that the text
    starts at 0.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def _replicate_value(name: str, value: Any, batch: int, p: int) -> Any:
    if isinstance(value, dict):  # masks by layer type
        return {key: _replicate_value(name, mask, batch, p) for key, mask in value.items()}
    if p == 1 or not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if name == "position_ids" and value.ndim == 3:  # [3, B, S] of multimodal rotary embeddings
        return value.repeat_interleave(p, dim=1) if value.shape[1] == batch else value
    return value.repeat_interleave(p, dim=0) if value.shape[0] == batch else value


def _checkpoints(decoder: PreTrainedModel) -> bool:
    return decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))


class _CheckpointWithStreams:
    """A checkpoint function whose recomputation sees the streams of the forward pass.

    On CUDA the recomputation runs in another thread.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = forward_state.streams

        def run(*inputs: Any) -> Any:
            previous, forward_state.streams = forward_state.streams, streams
            try:
                return function(*inputs)
            finally:
                forward_state.streams = previous

        return self.checkpoint(run, *args, **kwargs)


def _carry_streams_into_recomputation(decoder: PreTrainedModel) -> None:
    for module in decoder.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithStreams):
            module._gradient_checkpointing_func = _CheckpointWithStreams(checkpoint)


@contextmanager
def choose_streams(layer: DecoderStreams, streams: ActiveStreams | None) -> Iterator[None]:
    """Run `streams` (None: the backbone) through `layer`, whatever the model is set to.

    It holds inside the `with` block and in this thread only. Blocks of one thread nest; one that
    awaits or yields in the middle lets its choice out into what runs meanwhile.
    """
    choice = (layer, streams)
    forward_state.choices = (choice, *forward_state.choices)
    try:
        yield
    finally:
        # By identity: tasks and generators may end their blocks in another order.
        forward_state.choices = tuple(x for x in forward_state.choices if x is not choice)
