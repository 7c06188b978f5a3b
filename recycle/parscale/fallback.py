"""Prefixes in attention modules that do without transformers' attention interface.

Bloom, Falcon, GPT-J and their like compute attention by hand, but they all get their keys and
values from the cache that they are called with. So they are handed a cache that puts the prefix in
front of what it returns, and a mask and position bias that are wider by the prefix.

Dimensions: B batch, P streams, A attention heads, H key-value heads, n prefix tokens, Q query
length, K key length.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

# The modules that were found to work so, by class name, and the argument that brings the cache.
CACHE_ARGUMENT = {
    "BloomAttention": "layer_past",
    "CodeGenAttention": "layer_past",
    "FalconAttention": "layer_past",
    "GPTJAttention": "layer_past",
    "GPTNeoXJapaneseAttention": "layer_past",
    "MegatronBertSelfAttention": "past_key_values",
    "RemBertSelfAttention": "past_key_values",
    "XGLMAttention": "past_key_values",
}
# And those that were found not to.
REFUSED = {
    "GPTNeoSelfAttention": "with a mask of its own in local layers, which would hide the prefix",
    "MptAttention": "with positions that count padding, which would push the prefix away",
    "RoFormerSelfAttention": "with positions that count padding, which would push the prefix away",
}

# Puts a prefix, or nothing, before the keys and values of a call.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# What a call of a module is to be extended by, and by how many tokens; None to leave it alone.
Prefix = Callable[[nn.Module], tuple[Extend, int] | None]


class PrefixedCache(Cache):
    """What an attention module sees of the cache, or of none: `update` returns the prefix as well.

    Nothing but the text's own keys and values is ever stored.
    """

    def __init__(self, cache: Cache | None, extend: Extend) -> None:
        self.cache = cache
        self.extend = extend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B*P, H, n + K, D]` of a layer, with those given now at the end."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
        return self.extend(key_states, value_states)


def is_handmade(module: nn.Module) -> bool:
    """Whether a module computes attention by hand, in a way that takes prefixes."""
    return type(module).__name__ in CACHE_ARGUMENT


def intercept(module: nn.Module, prefix: Prefix) -> RemovableHandle:
    """Let `prefix` into the attention of a module for which `is_handmade` holds.

    What is hooked in can be pickled where `prefix`, a function of the module, can be.
    """
    names = tuple(inspect.signature(module.forward).parameters)
    hook = partial(_let_in, prefix, CACHE_ARGUMENT[type(module).__name__], names)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _let_in(
    prefix: Prefix,
    cache_argument: str,
    names: tuple[str, ...],  # of the arguments of the module's forward
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    found = prefix(module)
    if found is None:
        return None
    extend, n = found
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    kwargs[cache_argument] = PrefixedCache(kwargs.get(cache_argument), extend)
    if n:
        _widen(module, kwargs, n)
    return (), kwargs


def _widen(module: nn.Module, kwargs: dict[str, Any], n: int) -> None:
    """Make room for n prefix tokens in the mask and the position bias of a call, in place."""
    mask: Any = kwargs.get("attention_mask")
    alibi: Any = kwargs.get("alibi")
    if alibi is not None:  # [B*P*A, 1, K] of Bloom, [B*P, A, 1, K] of Falcon
        num_heads: Any = module.num_heads
        bias = _alibi_before_the_text(num_heads, n, alibi)  # [A, 1, n]
        rows = bias if alibi.ndim == 4 else bias.repeat(alibi.shape[0] // num_heads, 1, 1)
        kwargs["alibi"] = torch.cat([rows.expand(*alibi.shape[:-1], n), alibi], dim=-1)
        if alibi.ndim == 4:  # Falcon has it in the mask as well
            scale: Any = module.inv_norm_factor
            room = (bias * scale).to(mask).expand(*mask.shape[:-1], n)
            kwargs["attention_mask"] = torch.cat([room, mask], dim=-1)
            return
    if mask is not None:
        visible = 1.0 if mask.dtype == torch.bool else 0.0
        kwargs["attention_mask"] = F.pad(mask, (n, 0), value=visible)


def _alibi_before_the_text(num_heads: int, n: int, like: Tensor) -> Tensor:
    """ALiBi `[A, 1, n]` of n tokens at positions -n to -1."""
    two = torch.ones(1, 2, dtype=torch.long, device=like.device)
    slopes = build_alibi_tensor(two, num_heads, like.dtype)[:, :, 1:]  # at position 1
    return slopes * torch.arange(-n, 0, device=like.device)
