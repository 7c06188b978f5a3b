"""A run's models on their devices: each process holds a whole one, or a part of every layer."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recycle.backbone import Source, load_backbone
from recycle.recipe import Backbone
from recycle.sharding import shard

from .plan import RunPlan


def load(
    plan: RunPlan, backbone: Backbone | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """The run's backbone, or another, on the device; on the CPU, if it is to be shared out."""
    return load_backbone(backbone or plan.recipe.backbone, "cpu" if plan.sharded else plan.device)


def place(plan: RunPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Share out what `load` gave, with a LoRA merged into it or none, where that is the plan."""
    if plan.sharded:
        shard(model, plan.device)
    return model
