"""Learned keys and values of every stream, and how they enter attention.

Dimensions: B batch, P streams, H key-value heads, n prefix tokens, Q query length, K key length,
Dk and Dv key and value head size. Streams are batch-major: row `b * P + i` is stream i of sequence
b.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .fallback import Extend, intercept, is_handmade

PREFIX_CHILD = "stream_prefix"


@dataclass(frozen=True)
class ActiveStreams:
    """The streams of one forward pass of a decoder."""

    adapter: str
    num_streams: int
    p_values: tuple[int, ...]  # one: the P in use; several: all at once, in nested training


class _Values:
    """What `_ForwardState` holds in one thread."""

    def __init__(self) -> None:
        self.streams: ActiveStreams | None = None
        # What this thread chose, the latest first: a decoder's child and its streams.
        self.choices: tuple[tuple[nn.Module, ActiveStreams | None], ...] = ()


class _ForwardState(threading.local):
    """What the modules of a decoder see of the forward pass they are in; one for each thread.

    What compiled code sets lies one object deeper: torch.compile guards no class attribute, and
    where a graph breaks it forgets what was set on the `threading.local` itself.
    """

    def __init__(self) -> None:  # runs in every thread
        self._values = _Values()
        self.record: Callable[[nn.Module, Tensor, Tensor], None] | None = None

    @property
    def streams(self) -> ActiveStreams | None:
        return self._values.streams

    @streams.setter
    def streams(self, streams: ActiveStreams | None) -> None:
        self._values.streams = streams

    @property
    def choices(self) -> tuple[tuple[nn.Module, ActiveStreams | None], ...]:
        return self._values.choices

    @choices.setter
    def choices(self, choices: tuple[tuple[nn.Module, ActiveStreams | None], ...]) -> None:
        self._values.choices = choices


forward_state = _ForwardState()


class StreamLayer(BaseTunerLayer):
    """What the children of attention modules and of the decoder have in common in PEFT's eyes."""

    active_adapters: list[str]  # both are properties of PEFT's class
    disable_adapters: bool
    device: torch.device  # of the backbone's module, where an adapter is added

    def __init__(self) -> None:
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def enable(self) -> None:
        """Use the active adapter again, and leave alone which parameters are trained."""
        self._disable_adapters = False

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT calls it after a load with low_cpu_mem_usage; a child has no base layer to ask.
        for name, parameter in self.named_parameters():
            if adapter_name in name.split(".") and parameter.device.type != "meta":
                parameter.data = parameter.data.to(device or self.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "Streams run beside each other and cannot be merged into the backbone's weights. "
            "Use `unload()` to get the backbone back."
        )


class StreamPrefix(nn.Module, StreamLayer):
    """Child of an attention module: the learned keys and values of every stream, for each adapter.

    `parscale_keys` [P, H, n, Dk] and `parscale_values` [P, H, n, Dv], in float32.

    Source: arXiv 2505.10475 §2; upstream's `prefix_k` and `prefix_v`.
    """

    adapter_layer_names = ("parscale_keys", "parscale_values")

    def __init__(self, attention: nn.Module) -> None:
        nn.Module.__init__(self)
        StreamLayer.__init__(self)
        self._hook = intercept(attention, _handmade_prefix) if is_handmade(attention) else None
        self.parscale_keys = nn.ParameterDict()
        self.parscale_values = nn.ParameterDict()

    def add(
        self, adapter: str, shape: list[int], streams: int, tokens: int, device: torch.device
    ) -> None:
        """Add an adapter with a random start: normal with standard deviation 0.02, in float32."""
        self.device = device
        num_key_value_heads, key_size, value_size = shape
        for values, size in ((self.parscale_keys, key_size), (self.parscale_values, value_size)):
            start = torch.empty(
                streams, num_key_value_heads, tokens, size, device=device, dtype=torch.float32
            )
            values[adapter] = nn.Parameter(start.normal_(std=0.02))

    def remove(self) -> None:
        """Leave the attention module as it was."""
        if self._hook is not None:
            self._hook.remove()

    def prepend(self, streams: ActiveStreams, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before the text's keys [B*P, H, K, Dk] and values [B*P, H, K, Dv]."""
        return (
            _prepend(self.parscale_keys[streams.adapter][: streams.num_streams], key),
            _prepend(self.parscale_values[streams.adapter][: streams.num_streams], value),
        )


def _prepend(prefix: Tensor, text: Tensor) -> Tensor:
    text = text.unflatten(0, (-1, prefix.shape[0]))  # [B, P, H, K, D]
    prefix = prefix.to(text).expand(text.shape[0], -1, -1, -1, -1)
    return torch.cat([prefix, text], dim=3).flatten(0, 1)


def _handmade_prefix(module: nn.Module) -> tuple[Extend, int] | None:
    """What a call of a module without the attention interface has to be extended by."""
    streams, prefix = forward_state.streams, module._modules.get(PREFIX_CHILD)
    if streams is None or not isinstance(prefix, StreamPrefix):
        return None
    return partial(prefix.prepend, streams), prefix.parscale_keys[streams.adapter].shape[2]


def attend(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run an attention function of transformers with the active streams' prefixes in front.

    Without active streams, or in a module that has no prefix, the function is called as it is.

    Args:
        attention: The function that transformers chose for `implementation`.
        implementation: The name of that function, such as "sdpa".
        module: The attention module.
        query: `[B*P, heads, Q, Dk]`, after the rotary embedding.
        key: `[B*P, H, K, Dk]`, after the rotary embedding and the cache.
        value: `[B*P, H, K, Dv]`, after the cache.
        attention_mask: `[B*P or 1, heads or 1, Q, K]`, bool (true is visible) or additive; None
            where the function does without.
    """
    if forward_state.record is not None:
        forward_state.record(module, key, value)
    streams = forward_state.streams
    prefix = module._modules.get(PREFIX_CHILD)
    if streams is None or not isinstance(prefix, StreamPrefix):
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    key, value = prefix.prepend(streams, key, value)
    num_virtual_tokens = prefix.parscale_keys[streams.adapter].shape[2]
    position_bias = kwargs.get("position_bias")  # [B*P, heads, Q, K]; none for the prefix
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (num_virtual_tokens, 0))
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (num_virtual_tokens, 0), value=visible)
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if implementation != "sdpa" or query.shape[2] == 1 or not is_causal:
        return attention(module, query, key, value, None, *args, **kwargs)

    # Without a mask sdpa is causal from the upper left corner, so the prefix needs rows of its own.
    # Their outputs are dropped; a mask instead would rule out the flash kernels and compute the
    # upper triangle as well.
    query = F.pad(query, (0, 0, num_virtual_tokens, 0))
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (num_virtual_tokens, 0) * 2)
    output, weights = attention(module, query, key, value, None, *args, **kwargs)
    return output[:, num_virtual_tokens:], weights
