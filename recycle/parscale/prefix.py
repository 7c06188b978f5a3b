"""Learned keys and values of every stream, and how they enter attention.

Dimensions: B batch, P streams, A attention heads, H key-value heads, n prefix tokens, Q query
length, K key length, Dk and Dv key and value head size. Streams are batch-major: row `b * P + i` is
stream i of sequence b.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .active import ActiveStreams, Selection, this_thread
from .config import ParScaleConfig
from .fallback import Extend, intercept, is_handmade
from .layer import StreamLayer


class StreamPrefix(nn.Module, StreamLayer):
    """Child of an attention module: the learned keys and values of every stream, for each adapter.

    `parscale_keys` [P, H, n, Dk] and `parscale_values` [P, H, n, Dv], in float32.

    Source: arXiv 2505.10475 §2; upstream's `prefix_k` and `prefix_v`.
    """

    child_name = "stream_prefix"
    group = "prefix"
    adapter_layer_names = ("parscale_keys", "parscale_values")

    def __init__(self, attention: nn.Module, selection: Selection) -> None:
        nn.Module.__init__(self)
        StreamLayer.__init__(self, selection)
        self._hook = intercept(attention, _handmade_prefix) if is_handmade(attention) else None
        self.parscale_keys = nn.ParameterDict()
        self.parscale_values = nn.ParameterDict()

    @staticmethod
    def enters(config: ParScaleConfig, module: str) -> bool:
        """Every attention module has one."""
        return module in (config.attention_shapes or {})

    def add(self, adapter: str, config: ParScaleConfig, name: str, device: torch.device) -> None:
        """Add an adapter with a random start: normal with standard deviation 0.02, in float32."""
        assert config.attention_shapes is not None
        self.device = device
        num_key_value_heads, key_size, value_size = config.attention_shapes[name]
        for values, size in ((self.parscale_keys, key_size), (self.parscale_values, value_size)):
            shape = (config.num_streams, num_key_value_heads, config.num_virtual_tokens, size)
            start = torch.empty(shape, device=device, dtype=torch.float32)
            values[adapter] = nn.Parameter(start.normal_(std=0.02))

    @staticmethod
    def cut(leaf: str, tensor: Tensor, p: int) -> Tensor:
        """Every parameter has the streams as its first dimension."""
        return tensor[:p]

    def remove(self) -> None:
        """Leave the attention module as it was."""
        if self._hook is not None:
            self._hook.remove()

    def prepend(self, active: ActiveStreams, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before the text's keys [B*P, H, K, Dk] and values [B*P, H, K, Dv]."""
        return (
            _prepend(self.parscale_keys[active.adapter][: active.num_streams], key),
            _prepend(self.parscale_values[active.adapter][: active.num_streams], value),
        )

    def num_virtual_tokens(self, active: ActiveStreams) -> int:
        return self.parscale_keys[active.adapter].shape[2]


def _prepend(prefix: Tensor, text: Tensor) -> Tensor:
    text = text.unflatten(0, (-1, prefix.shape[0]))  # [B, P, H, K, D]
    prefix = prefix.to(text).expand(text.shape[0], -1, -1, -1, -1)
    return torch.cat([prefix, text], dim=3).flatten(0, 1)


def _handmade_prefix(module: nn.Module) -> tuple[Extend, int] | None:
    """What a call of a module without the attention interface has to be extended by."""
    active, prefix = this_thread.forward.active, module._modules.get(StreamPrefix.child_name)
    if active is None or not isinstance(prefix, StreamPrefix):
        return None
    return partial(prefix.prepend, active), prefix.num_virtual_tokens(active)


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
        query: `[B*P, A, Q, Dk]`, after the rotary embedding.
        key: `[B*P, H, K, Dk]`, after the rotary embedding and the cache.
        value: `[B*P, H, K, Dv]`, after the cache.
        attention_mask: `[B*P or 1, A or 1, Q, K]`, bool (true is visible) or additive; None
            where the function does without.
    """
    if this_thread.forward.record is not None:
        this_thread.forward.record(module, key, value)
    active = this_thread.forward.active
    prefix = module._modules.get(StreamPrefix.child_name)
    if active is None or not isinstance(prefix, StreamPrefix):
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    key, value = prefix.prepend(active, key, value)
    n = prefix.num_virtual_tokens(active)
    position_bias = kwargs.get("position_bias")  # [B*P, A, Q, K]; none for the prefix
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (n, 0))
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (n, 0), value=visible)
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if implementation != "sdpa" or query.shape[2] == 1 or not is_causal:
        return attention(module, query, key, value, None, *args, **kwargs)

    # Without a mask sdpa is causal from the upper left corner, so the prefix needs rows of its own.
    # Their outputs are dropped; a mask instead would rule out the flash kernels and compute the
    # upper triangle as well.
    query = F.pad(query, (0, 0, n, 0))
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (n, 0) * 2)
    output, weights = attention(module, query, key, value, None, *args, **kwargs)
    return output[:, n:], weights
