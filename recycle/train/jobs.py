"""What a recipe trains: which adapters, for how many steps, from which start."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model
from torch import Tensor

from recycle.family.folder import CONTROL, NESTED
from recycle.parscale import ParScaleConfig
from recycle.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One training: an adapter, the values of P it learns at once, and its prefixes' rate."""

    adapter: str
    p_values: tuple[int, ...]
    prefix_learning_rate: float


def jobs(recipe: Recipe) -> list[Job]:
    """The adapters that a recipe trains, one after the other.

    The one with the most streams comes first, so that what does not fit into memory shows at once.
    """
    rate = recipe.training.prefix_learning_rate
    if recipe.method.nested:
        found = [Job(NESTED, recipe.streams, rate)]
    else:
        found = [Job(f"p{p}", (p,), rate) for p in reversed(recipe.streams)]
    if recipe.training.control:
        found.append(Job(CONTROL, (1,), recipe.training.control_learning_rate))
    return found


def steps(recipe: Recipe) -> int:
    """Optimiser steps that meet the token budget to within one; none for no budget."""
    per_step = recipe.training.batch_size * recipe.data.block_size
    return max(recipe.training.tokens // per_step, int(recipe.training.tokens > 0))


def add_adapter(model: Any, job: Job, recipe: Recipe, starts: Tensor) -> PeftModelForCausalLM:
    """Add a job's untrained adapter to a backbone, or the PEFT model it became, and activate it.

    Args:
        starts: `[streams, n]` token ids of the texts that streams start from; a job takes the
            first of them.
    """
    torch.manual_seed(recipe.training.seed)
    p = job.p_values[-1]
    text = recipe.method.init == "text"
    config = ParScaleConfig(
        num_streams=p,
        p_values=list(job.p_values),
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        smoothing=recipe.method.smoothing,
        init=recipe.method.init,
        start_token_ids=starts[:p].tolist() if text else None,
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        backbone_quantization=recipe.backbone.quantization,
    )
    if isinstance(model, PeftModelForCausalLM):
        model.add_adapter(job.adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=job.adapter)
    model.set_adapter(job.adapter)
    return model
