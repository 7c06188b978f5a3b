"""Replicate before the decoder, aggregate after it.

Dimensions: B batch, P streams, H key-value heads, S sequence, D hidden size. Streams are
batch-major: row `b * P + i` is stream i of sequence b, so everything outside the decoder sees
batch B.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .active import ActiveStreams, Selection, choose, this_thread
from .aggregator import Aggregator, merge
from .cache import StreamCache, claim_cache
from .config import ParScaleConfig
from .decoder import find_decoder
from .errors import ParScaleError
from .layer import StreamLayer
from .packing import keeps_sequences_apart, may_be_packed, starts_again
from .recomputation import carry_no_streams, carry_streams, checkpointable_modules, is_checkpointed

SUPPORTED_ATTENTION = ("sdpa", "eager")


class DecoderStreams(nn.Module, StreamLayer):
    """Child of the decoder: the aggregators, and the two hooks that put the streams around it.

    Outside, `last_hidden_state`, the last of `hidden_states` and the cache have batch B. What lies
    between the decoder's ends keeps its streams: the other `hidden_states` and the `attentions`
    have batch B*P. Router logits count as those of P times as many layers.
    """

    child_name = "streams"
    group = "aggregator"
    adapter_layer_names = ("parscale_aggregator",)

    def __init__(self, decoder: PreTrainedModel, selection: Selection) -> None:
        nn.Module.__init__(self)
        StreamLayer.__init__(self, selection)
        self.parscale_aggregator = nn.ModuleDict()
        # RoBERTa and its like count positions themselves, and from 2.
        self._counts_positions = any(
            hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()
        )
        self._argument_names = list(inspect.signature(decoder.forward).parameters)
        self._checkpointable = checkpointable_modules(decoder)
        self._sequences_kept_apart: bool | None = None  # by the backbone; not yet known
        self._hooks = [
            decoder.register_forward_pre_hook(self._replicate, with_kwargs=True),
            decoder.register_forward_hook(self._aggregate, with_kwargs=True, always_call=True),
        ]

    @staticmethod
    def enters(config: ParScaleConfig, module: str) -> bool:
        """The decoder has them."""
        return module == config.decoder

    def add(self, adapter: str, config: ParScaleConfig, name: str, device: torch.device) -> None:
        """Add an adapter's aggregators; its largest P is in use first."""
        assert config.hidden_size is not None
        assert config.p_values is not None
        self.device = device
        self.parscale_aggregator[adapter] = Aggregator(
            config.hidden_size, config.p_values, config.smoothing, device
        )
        self.selection.add(adapter, config)

    @staticmethod
    def cut(leaf: str, tensor: Tensor, p: int) -> Tensor | None:
        """Every P has an aggregator of its own."""
        return tensor if leaf.startswith(f"p{p}_") else None

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.selection.remove(adapter_name)

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()
        carry_no_streams(self._checkpointable)

    # ---- before the decoder

    def _replicate(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make the decoder's inputs [B, ...] into those of all streams, [B*P, ...]."""
        this_thread.forward.active = None
        active = self.selection.current()
        inputs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        if inputs.get("past_key_values") is not None:
            claim_cache(inputs["past_key_values"], active)
        if active is None:
            return None
        self._refuse(decoder, inputs)
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens  # [B, S] or [B, S, D]
        if may_be_packed(inputs):
            self._keep_apart(decoder, inputs)
        self.count_positions(inputs, length=tokens.shape[1])
        for name, value in inputs.items():
            inputs[name] = _repeat(name, value, tokens.shape[0], active.num_streams)
        self._wrap_cache(decoder, inputs, active)
        if torch.is_grad_enabled() and (
            not torch.compiler.is_compiling() or is_checkpointed(decoder)
        ):
            carry_streams(self._checkpointable)
        this_thread.forward.active = active
        return (), inputs

    def _refuse(self, decoder: PreTrainedModel, inputs: dict[str, Any]) -> None:
        implementation = decoder.config._attn_implementation
        if implementation not in SUPPORTED_ATTENTION:
            raise ParScaleError(
                f"Streams run with attn_implementation {' or '.join(SUPPORTED_ATTENTION)}, got "
                f"{implementation!r}. Load the backbone with attn_implementation='sdpa'."
            )
        refuse_adapter_names(inputs)  # past PEFT, which would have refused them

    def _keep_apart(self, decoder: PreTrainedModel, inputs: dict[str, Any]) -> None:
        """Let no sequences see each other that are packed into one row.

        Only the device knows whether they are, and a pass that asks it has to wait. A pass need not
        ask that fills no cache, on a backbone which keeps them apart: packed or not, it is right.
        So training with `use_cache=False` does not wait here. (transformers itself asks once more
        in such a pass, where it makes the mask.)
        """
        positions, cache = inputs["position_ids"], inputs.get("past_key_values")
        use_cache = inputs.get("use_cache")
        fills = cache is not None or (decoder.config.use_cache if use_cache is None else use_cache)
        if (fills or not self._keeps_apart(decoder, positions)) and not starts_again(positions):
            return
        if cache is not None and cache.get_seq_length():  # such as branches after one beginning
            return
        if cache is not None or use_cache:
            raise ParScaleError(
                "Sequences packed into one row (position_ids that start again) see each other "
                "where there is a cache. Pass use_cache=False and no past_key_values."
            )
        if not self._keeps_apart(decoder, positions):
            raise ParScaleError(
                f"{type(decoder).__name__} lets sequences that are packed into one row see each "
                "other, whatever their position_ids: its mask does not heed them, or its layers "
                "carry states along the row. Give each sequence a row of its own, with padding."
            )
        inputs["use_cache"] = False

    def _keeps_apart(self, decoder: PreTrainedModel, positions: Tensor) -> bool:
        if self._sequences_kept_apart is None:
            self._sequences_kept_apart = keeps_sequences_apart(decoder, positions.device)
        return self._sequences_kept_apart

    def count_positions(self, inputs: dict[str, Any], length: int) -> None:
        """Count the positions of padded text from its first token on, as `generate` does.

        A prefix carries no rotary embedding, so other than in the backbone it matters that the text
        starts at 0.
        """
        mask = inputs.get("attention_mask")  # [B, K]
        if (
            not self._counts_positions
            and inputs.get("position_ids") is None
            and "position_ids" in self._argument_names
            and isinstance(mask, Tensor)
            and mask.ndim == 2
        ):
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -length:]  # [B, S]

    def _wrap_cache(
        self, decoder: PreTrainedModel, inputs: dict[str, Any], active: ActiveStreams
    ) -> None:
        """Show the decoder a cache of batch B*P; make one where it would make its own."""
        cache, use_cache = inputs.get("past_key_values"), inputs.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not is_checkpointed(decoder):
            cache = DynamicCache(config=decoder.config)
            claim_cache(cache, active)
        if cache is not None:
            inputs["past_key_values"] = StreamCache(cache, active.num_streams)

    # ---- after the decoder

    def _aggregate(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Merge the streams' final hidden states [B*P, S, D] into [B, S, D], one for each P."""
        active, this_thread.forward.active = this_thread.forward.active, None
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StreamCache):
            cache.close()
        if active is None or output is None:
            return None
        hidden = output[0].unflatten(0, (-1, active.num_streams))  # [B, P, S, D]
        merged = merge(self.parscale_aggregator[active.adapter], hidden, active)
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


def _repeat(name: str, value: Any, batch: int, p: int) -> Any:
    """One of the decoder's inputs, with each row P times."""
    if isinstance(value, dict):  # masks by layer type
        return {key: _repeat(name, mask, batch, p) for key, mask in value.items()}
    if p == 1 or not isinstance(value, Tensor) or value.ndim < 2:
        return value
    # Multimodal rotary embeddings have position ids [3, B, S].
    dim = 1 if name == "position_ids" and value.ndim == 3 else 0
    return value.repeat_interleave(p, dim=dim) if value.shape[dim] == batch else value


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


def refuse_adapter_names(inputs: dict[str, Any]) -> None:
    """Raise `ParScaleError` where each row of a batch asks for an adapter of its own."""
    if inputs.get("adapter_names") is not None:
        raise ParScaleError(
            "ParScale runs one adapter for the whole batch and takes no adapter_names, got "
            f"{inputs['adapter_names']}. Choose one with model.set_adapter(name) or "
            "recycle.set_p(model, p)."
        )


def find_streams(model: nn.Module) -> DecoderStreams | None:
    """The streams around the decoder of a model; None where it has no ParScale adapter."""
    streams = find_decoder(model)._modules.get(DecoderStreams.child_name)
    return streams if isinstance(streams, DecoderStreams) else None


def streams_of(model: nn.Module) -> DecoderStreams:
    """The streams around the decoder of a model with ParScale adapters.

    Raises:
        ParScaleError: The model has none.
    """
    if isinstance(model, DecoderStreams):
        return model
    streams = find_streams(model)
    if streams is None:
        raise ParScaleError(
            f"{type(model).__name__} has no ParScale adapter. Load one with recycle.load(folder), "
            "or add one with peft.get_peft_model(model, recycle.parscale.ParScaleConfig(...))."
        )
    return streams


@contextmanager
def choose_streams(model: nn.Module, active: ActiveStreams | None) -> Iterator[None]:
    """Run these streams (None: the backbone) through a model, whatever it is set to.

    It holds inside the `with` block and in this thread only. Blocks of one thread nest. A model
    without any ParScale adapter is its backbone.
    """
    if active is None and not isinstance(model, DecoderStreams) and find_streams(model) is None:
        yield
        return
    with choose(streams_of(model).selection, active):
        yield
