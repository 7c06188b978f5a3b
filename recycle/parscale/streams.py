"""Replicate before the decoder, aggregate after it.

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
from transformers.cache_utils import Cache, DynamicCache

from .aggregator import Aggregator
from .cache import StreamCache, check_cache
from .packing import is_packed, keeps_sequences_apart
from .prefix import ActiveStreams, StreamLayer, forward_state

STREAMS_CHILD = "streams"
SUPPORTED_ATTENTION = ("sdpa", "eager")


class DecoderStreams(nn.Module, StreamLayer):
    """Child of the decoder: the aggregators, and the two hooks that put the streams around it.

    Outside, `last_hidden_state`, the last of `hidden_states` and the cache have batch B. What lies
    between the decoder's ends keeps its streams: the other `hidden_states` and the `attentions`
    have batch B*P. Router logits count as those of P times as many layers.
    """

    adapter_layer_names = ("parscale_aggregator",)

    def __init__(self, decoder: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        StreamLayer.__init__(self)
        self.parscale_aggregator = nn.ModuleDict()
        self.p: dict[str, int] = {}  # the P in use, for each adapter
        self.p_values: dict[str, list[int]] = {}
        # RoBERTa and its like count positions themselves, and from 2.
        self._counts_positions = any(
            hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()
        )
        self._argument_names = list(inspect.signature(decoder.forward).parameters)
        self._keeps_sequences_apart: bool | None = None  # not yet known
        self._hooks = [
            decoder.register_forward_pre_hook(self._replicate, with_kwargs=True),
            decoder.register_forward_hook(self._aggregate, with_kwargs=True, always_call=True),
        ]

    def add(
        self,
        adapter: str,
        hidden_size: int,
        p_values: list[int],
        smoothing: float,
        device: torch.device,
    ) -> None:
        """Add an adapter's aggregators; its largest P is in use first."""
        self.device = device
        self.parscale_aggregator[adapter] = Aggregator(hidden_size, p_values, smoothing, device)
        self.p_values[adapter] = list(p_values)
        self.p[adapter] = p_values[-1]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.p_values.pop(adapter_name, None)
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
        check_cache(cache, streams)
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
        if kwargs.get("adapter_names") is not None:  # past PEFT, which would have refused them
            raise ValueError(
                "ParScale runs one adapter for the whole batch and takes no adapter_names, got "
                f"{kwargs['adapter_names']}. Choose one with recycle.set_p(model, p)."
            )
        text = kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        if is_packed(kwargs):
            self._check_packing(decoder, text.device)
            kwargs["use_cache"] = False
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
        if torch.is_grad_enabled() and (not torch.compiler.is_compiling() or _checkpoints(decoder)):
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
        # Several P are stacked along the batch: [|P|*B, S, D], the first P first.
        merged = torch.cat([aggregator(hidden[:, :p]) for p in streams.p_values])
        if isinstance(output, tuple):
            last = output[0]
            return tuple(_outside(part, last, merged) for part in output)
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

    def _check_packing(self, decoder: PreTrainedModel, device: torch.device) -> None:
        if self._keeps_sequences_apart is None:
            with choose_streams(self, None):
                self._keeps_sequences_apart = keeps_sequences_apart(decoder, device)
        if not self._keeps_sequences_apart:
            raise ValueError(
                f"{type(decoder).__name__} lets sequences that are packed into one row see each "
                "other, whatever their position_ids: its mask does not heed them, or its layers "
                "carry states along the row. Give each sequence a row of its own, with padding."
            )


def _outside(part: Any, last: Tensor, merged: Tensor) -> Any:
    """What the decoder's caller gets for one part of its output, where that is a tuple."""
    if part is last:
        return merged
    if isinstance(part, StreamCache):
        return part.cache
    if isinstance(part, tuple) and part and part[-1] is last:  # hidden states
        return *part[:-1], merged
    return part


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
            if forward_state.streams == streams:  # no recomputation; in a graph nothing may be set
                return function(*inputs)
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
