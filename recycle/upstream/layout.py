"""Upstream's names and layout (QwenLM/ParScale) of what it adds to Qwen2, and ours.

P streams, n prefix tokens, H key-value heads of size Dk, width D, L layers. Upstream keeps
`model.layers.N.self_attn.prefix_k|prefix_v [P, H, n, Dk]` and
`model.aggregate_layer.0|2.{weight,bias}` beside the backbone's own tensors. Its first aggregator
layer reads the streams' concatenation with the stream innermost (`d*P + i`), ours with the stream
outermost (`i*D + d`).
"""

import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Qwen2Config

FIRST_AGGREGATOR = "model.aggregate_layer.0.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIASES = tuple(f"self_attn.{kind}_proj.bias" for kind in "qkv")  # that a Llama lacks
GENERATION = "generation_config.json"

_NEW = re.compile(
    r"model\.(layers\.\d+\.self_attn\.prefix_[kv]|aggregate_layer\.[02]\.(weight|bias))"
)
_OURS = "base_model.model.model"


class Sizes(NamedTuple):
    """What the shapes of a checkpoint's tensors are made of."""

    p: int
    n: int
    num_key_value_heads: int
    head_dim: int
    width: int
    layers: int

    @staticmethod
    def of(config: dict[str, Any]) -> "Sizes":
        """From a config.json in upstream's format."""
        whole = Qwen2Config.from_dict(deepcopy(config))  # it changes what lies inside
        head_dim = config.get("head_dim") or whole.hidden_size // whole.num_attention_heads
        return Sizes(
            config["parscale_n"],
            config["parscale_n_tokens"],
            whole.num_key_value_heads,
            head_dim,
            whole.hidden_size,
            whole.num_hidden_layers,
        )


def is_new(name: str) -> bool:
    """Whether a tensor is one of those that upstream adds to Qwen2's."""
    return bool(_NEW.fullmatch(name))


def new_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that upstream adds."""
    p, n, num_key_value_heads, head_dim, width, layers = sizes
    prefixes = {
        f"model.layers.{layer}.self_attn.prefix_{kind}": (p, num_key_value_heads, n, head_dim)
        for layer in range(layers)
        for kind in "kv"
    }
    return prefixes | {
        FIRST_AGGREGATOR: (width, p * width),
        "model.aggregate_layer.0.bias": (width,),
        "model.aggregate_layer.2.weight": (p, width),
        "model.aggregate_layer.2.bias": (p,),
    }


def our_name(name: str, p: int) -> str:
    """What a tensor that upstream adds is called in an adapter's file."""
    *path, leaf = name.split(".")
    if leaf.startswith("prefix_"):
        kind = {"prefix_k": "keys", "prefix_v": "values"}[leaf]
        return f"{_OURS}.{'.'.join(path[1:])}.stream_prefix.parscale_{kind}"
    layer = {"0": "hidden", "2": "output"}[path[-1]]
    return f"{_OURS}.streams.parscale_aggregator.p{p}_{layer}_{leaf}"


def to_ours(name: str, tensor: Tensor, p: int) -> Tensor:
    """A tensor that upstream adds, in our layout: float32, the stream outermost."""
    tensor = tensor.float()
    if name == FIRST_AGGREGATOR:
        width = tensor.shape[0]
        tensor = tensor.view(width, width, p).transpose(1, 2).reshape(width, p * width)
    return tensor.contiguous()


def to_theirs(name: str, tensor: Tensor, p: int) -> Tensor:
    """The inverse of `to_ours`: float32, the stream innermost."""
    tensor = tensor.float()
    if name == FIRST_AGGREGATOR:
        width = tensor.shape[0]
        tensor = tensor.view(width, p, width).transpose(1, 2).reshape(width, width * p)
    return tensor.contiguous()


def backbone_names(layers: int, tied: bool) -> set[str]:
    """The tensors of a Qwen2 model; a tied output head is the embedding and none of its own."""
    return {EMBEDDING, "model.norm.weight", *([] if tied else [HEAD])} | {
        f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in _layer_leaves()
    }


def _layer_leaves() -> Iterator[str]:
    yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
    yield "self_attn.o_proj.weight"
    for kind in "qkv":
        yield from (f"self_attn.{kind}_proj.weight", f"self_attn.{kind}_proj.bias")
    for kind in ("gate", "up", "down"):
        yield f"mlp.{kind}_proj.weight"


def first_of(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> bool:
    """Copy the files whose names match; whether there were any."""
    found = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    for file in found:
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(file, copied)
    return bool(found)
