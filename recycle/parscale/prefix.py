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
        prefix_keys, prefix_values = self.of(active)
        return _prepend(prefix_keys, key), _prepend(prefix_values, value)

    def of(self, active: ActiveStreams) -> tuple[Tensor, Tensor]:
        """The prefix of the streams in use: keys `[P, H, n, Dk]` and values `[P, H, n, Dv]`."""
        keys, values = self.parscale_keys[active.adapter], self.parscale_values[active.adapter]
        return keys[active.rows], values[active.rows]

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

    if implementation == "sdpa" and query.shape[2] == 1 and _is_plain(attention_mask, kwargs):
        keys, values = prefix.of(active)
        scaling = kwargs.get("scaling")
        return _attend_apart(query, keys, values, key, value, attention_mask, scaling), None

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


def _is_plain(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether one query's attention is no more than softmax over scores, with one mask for all."""
    if attention_mask is not None and attention_mask.shape[1] > 1:
        return False
    return not any(
        kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")
    ) and not kwargs.get("dropout")


def _attend_apart(
    query: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Attention `[B*P, 1, A, Dv]` of one token's query to prefix and text apart.

    A step of decoding reads the whole cache. To put the prefix in front of it, and to repeat its
    heads for the queries that share them, would write and read it several times more. Here only
    the scores are put together. They are computed in float32, as in torch's kernels. The arguments
    are those of `attend` and `StreamPrefix.of`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    p, num_heads, n, _ = prefix_keys.shape
    query = query.squeeze(2).unflatten(1, (num_heads, -1)).unflatten(0, (-1, p))
    key, value = key.unflatten(0, (-1, p)), value.unflatten(0, (-1, p))  # [B, P, H, K, Dk|Dv]
    query = query.to(exact) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    to_prefix = query @ prefix_keys.to(exact).mT  # [B, P, H, A/H, Dk] to [B, P, H, A/H, n]
    to_text = query @ key.to(exact).mT  # [B, P, H, A/H, K]
    if attention_mask is not None:
        mask = attention_mask.expand(query.shape[0] * p, -1, -1, -1).unflatten(0, (-1, p))
        if mask.dtype == torch.bool:
            to_text = to_text.masked_fill(~mask, -torch.inf)
        else:
            to_text = to_text + mask
    weights = torch.cat([to_prefix, to_text], dim=-1).softmax(dim=-1).to(value.dtype)
    output = weights[..., :n] @ prefix_values.to(value) + weights[..., n:] @ value
    return output.flatten(2, 3).flatten(0, 1).unsqueeze(1)
