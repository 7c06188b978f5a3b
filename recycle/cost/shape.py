"""What a model's cost depends on, counted on its modules.

Dimensions: D hidden size, V vocabulary, H key-value heads, Dk and Dv sizes of a key and a value.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from recycle.backbone.errors import BackboneError
from recycle.backbone.skeleton import one_line, shapes_alone
from recycle.errors import RecycleError
from recycle.parscale import ParScaleConfig, find_decoder
from recycle.parscale.location import locate_attention

# A configuration's words for how many experts a token is sent to.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k")


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM; of parts of all layers together. Widened ones need not be whole."""

    layers: int
    hidden: float
    """D."""
    vocabulary: int
    """V."""
    heads: float
    """Of queries, in a layer."""
    attention: float
    """Parameters of the attention's matrices."""
    mlp: float
    """Parameters of all other matrices of the decoder."""
    experts: float
    """Those of them in stacks [experts, …], no `nn.Linear`: quantising leaves them."""
    active_mlp: float
    """Those of them that one token passes through: of experts, only its own."""
    vectors: float
    """Norms, biases and tables of the decoder: whatever multiplies no text."""
    embedding: float
    """Parameters of the input table."""
    head: float
    """Parameters of an output matrix of its own; 0 where it is the input table."""
    others: float
    """Parameters outside the decoder and the tables."""
    inner: float
    """Numbers that the widest matrix of an MLP gives for a token."""
    scores: float
    """Sum of heads * (Dk + Dv) over the attention layers."""
    keys_values: float
    """Sum of H * (Dk + Dv) over the attention layers: numbers that a token leaves in the cache."""

    @property
    def non_embedding(self) -> float:
        """N of the scaling law."""
        return self.attention + self.mlp + self.vectors + self.others

    @property
    def parameters(self) -> float:
        return self.non_embedding + self.embedding + self.head

    def adapter_parameters(self, p_values: tuple[int, ...], prefix: int) -> int:
        """Of streams that serve several P: the most prefixes, and an aggregator for each P."""
        d = round(self.hidden)
        aggregators = sum(p * d * d + d + d * p + p for p in p_values if p > 1)
        return max(p_values) * prefix * round(self.keys_values) + aggregators

    def widened(self, parameters: float) -> "Shape":
        """The shape with so many parameters outside the embeddings: all widths in proportion.

        Layers and heads stay as they are. Matrices grow with the square of the widths.
        """
        square, linear = self.attention + self.mlp, self.vectors + self.others
        times = (math.sqrt(linear**2 + 4 * square * parameters) - linear) / (2 * square)
        power = dict.fromkeys(("attention", "mlp", "experts", "active_mlp"), 2)
        power |= dict.fromkeys(("layers", "vocabulary", "heads"), 0)
        grown = {
            x.name: getattr(self, x.name) * times ** power.get(x.name, 1) for x in fields(self)
        }
        return replace(self, **grown)


def count_outside_embeddings(model: Any) -> int:
    """Parameters outside the input and the output embedding: N of the scaling law."""
    return int(model.num_parameters() - sum(x.numel() for x in _tables(model).values()))


def _tables(model: Any) -> dict[int, nn.Parameter]:
    """The input table and, where it is another, the output matrix, by identity."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return {id(x.weight): x.weight for x in ends if x is not None}


def model_shape(model: Any) -> Shape:
    """The shape of a model, or of a skeleton.

    Raises:
        BackboneError: The sizes of its config do not fit together.
        UnsupportedModelError: Streams cannot enter it.
    """
    place = ParScaleConfig()
    try:
        with shapes_alone():
            locate_attention(model, place)
    except RecycleError:
        raise
    except Exception as error:  # as in `load_skeleton`: it can be built, and its sizes do not fit
        raise BackboneError(
            f"The model's config has sizes that do not fit together, or fewer than two tokens: a "
            f"pass of it fails with {one_line(error)}. Copy or fetch it again."
        ) from None
    assert place.attention_shapes is not None
    assert place.hidden_size is not None
    config = model.config.get_text_config(decoder=True)
    decoder, tables = find_decoder(model), _tables(model)
    inside = {id(x) for x in decoder.parameters()}
    looked_up = {id(x.weight) for x in decoder.modules() if isinstance(x, nn.Embedding)}
    sizes = dict.fromkeys(("attention", "mlp", "experts", "active_mlp", "vectors", "others"), 0.0)
    inner = 0
    top_k = next((k for x in TOP_K if isinstance(k := getattr(config, x, None), int)), 1)
    for name, x in model.named_parameters():
        expert = "expert" in name and x.ndim == 3
        if id(x) in tables:
            continue
        if id(x) not in inside:
            sizes["others"] += x.numel()
        elif id(x) in looked_up or (x.ndim != 2 and not expert):
            sizes["vectors"] += x.numel()
        elif any(name.startswith(f"{module}.") for module in place.attention_shapes):
            sizes["attention"] += x.numel()
        else:
            share = min(top_k / x.shape[0], 1) if expert else 1
            sizes["mlp"] += x.numel()
            sizes["experts"] += x.numel() * expert
            sizes["active_mlp"] += x.numel() * share
            inner = max(inner, max(x.shape[-2:]) * (round(share * x.shape[0]) if expert else 1))
    embedding, *rest = tables.values()
    shapes = place.attention_shapes.values()
    heads = getattr(config, "num_attention_heads", None)  # of some types a list
    heads = heads if isinstance(heads, int) else max(shape[0] for shape in shapes)
    return Shape(
        layers=int(getattr(config, "num_hidden_layers", len(shapes))),
        hidden=place.hidden_size,
        vocabulary=model.get_input_embeddings().num_embeddings,
        heads=heads,
        embedding=embedding.numel(),
        head=sum(x.numel() for x in rest),
        inner=inner,
        scores=sum(heads * (key + value) for _, key, value in shapes),
        keys_values=sum(number * (key + value) for number, key, value in shapes),
        **sizes,
    )
