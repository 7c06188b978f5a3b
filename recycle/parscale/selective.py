"""Activation checkpointing as transformers is told of it: of everything, or of what is cheap.

Selective checkpointing keeps what products of matrices and attention gave, and computes the rest
again: norms, activations, rotary embeddings, sums, and products of so few numbers each that they
are cheap (of a LoRA's second matrix). That takes little time, and less memory than to keep it all.
"""

from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}
# Whatever their widths: those of experts and of int8. A matrix in nf4 is made whole again, and
# multiplied as any other.
KEPT = {"aten::_grouped_mm", "bitsandbytes::int8_scaled_mm", "bitsandbytes::int8_mixed_scaled_mm"}
CHEAP = 1 / 8  # numbers added up in a product, to the width of its result
ATTENTION = ("aten::_scaled_dot_product_", "aten::_flash_attention", "aten::_efficient_attention")


def checkpointing_arguments(checkpointing: bool | Literal["selective"]) -> dict[str, Any]:
    """`gradient_checkpointing_kwargs` of transformers for a recipe's `gradient_checkpointing`."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return arguments


def _policy(context: Any, operation: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation._schema.name
    kept = name in KEPT or name.startswith(ATTENTION)
    if name in PRODUCTS:
        left, right = [x for x in args if isinstance(x, Tensor)][-2:]  # [..., N, K] and [..., K, M]
        kept = left.shape[-1] >= CHEAP * right.shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
