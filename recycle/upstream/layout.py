"""Upstream's names and layout (QwenLM/ParScale) of what it adds to Qwen2, and ours.

P streams, n prefix tokens, H key-value heads of size Dk, width D, L layers. Upstream keeps
`model.layers.N.self_attn.prefix_k|prefix_v [P, H, n, Dk]` and
`model.aggregate_layer.0|2.{weight,bias}` beside the backbone's own tensors. Its first aggregator
layer reads the streams' concatenation with the stream innermost (`d*P + i`), ours with the stream
outermost (`i*D + d`).
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from .tensors import CheckpointError, Stored

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIASES = tuple(f"self_attn.{kind}_proj.bias" for kind in "qkv")  # that a Llama lacks

_FIRST_AGGREGATOR = "model.aggregate_layer.0.weight"
_OURS = "base_model.model.model"

Shapes = dict[str, tuple[int, ...]]


def whole_config(config: dict[str, Any]) -> Qwen2Config:
    """A config.json with transformers' defaults filled in."""
    return Qwen2Config.from_dict(deepcopy(config))  # it changes what lies inside


def qwen2_shapes(config: dict[str, Any], held: dict[str, Stored]) -> Shapes:
    """The shape of every tensor of the Qwen2 model that a config.json describes.

    A head that is tied to the embedding counts where it is among the tensors `held`.
    """
    with torch.device("meta"):
        model = Qwen2ForCausalLM(whole_config(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and HEAD not in held:
        del shapes[HEAD]
    return shapes


def new_shapes(config: dict[str, Any]) -> Shapes:
    """The shape of every tensor that upstream adds; to one stream it adds none."""
    whole = whole_config(config)
    p, width = config["parscale_n"], whole.hidden_size
    if p == 1:
        return {}
    head_dim = config.get("head_dim") or width // whole.num_attention_heads
    prefix = (p, whole.num_key_value_heads, config["parscale_n_tokens"], head_dim)
    prefixes = {
        f"model.layers.{layer}.self_attn.prefix_{kind}": prefix
        for layer in range(whole.num_hidden_layers)
        for kind in "kv"
    }
    return prefixes | {
        _FIRST_AGGREGATOR: (width, p * width),
        "model.aggregate_layer.0.bias": (width,),
        "model.aggregate_layer.2.weight": (p, width),
        "model.aggregate_layer.2.bias": (p,),
    }


def check_tensors(held: dict[str, Stored], shapes: Shapes, where: str, what: str, do: str) -> None:
    """Refuse tensors that are not those of a config.json: missing, unknown or of another shape.

    Errors say `where` the model is, `what` it is by its config.json, and what to `do`.
    """
    missing, more = sorted(shapes.keys() - held.keys()), sorted(held.keys() - shapes.keys())
    if missing:
        raise CheckpointError(
            f"{where} lacks tensor {_first_of(missing)}: no file of it holds what {what} of its "
            f"config.json has. {do}"
        )
    if more:
        raise CheckpointError(
            f"{held[more[0]].file} holds tensor {_first_of(more)}, which {what} of its config.json "
            f"does not have. {do}"
        )
    for name, tensor in held.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, and by config.json it is "
                f"{shapes[name]} in {what}. {do}"
            )


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


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
    return _swapped(name, tensor, len(tensor), p)


def to_theirs(name: str, tensor: Tensor, p: int) -> Tensor:
    """The inverse of `to_ours`: float32, the stream innermost."""
    return _swapped(name, tensor, p, len(tensor))


def _swapped(name: str, tensor: Tensor, outer: int, inner: int) -> Tensor:
    tensor = tensor.float()
    if name == _FIRST_AGGREGATOR:
        tensor = tensor.unflatten(1, (outer, inner)).transpose(1, 2).flatten(1)
    return tensor.contiguous()
