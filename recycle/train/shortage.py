"""What takes less memory in a training: fields of the recipe and values, the best first."""

from collections.abc import Iterator
from typing import Any

from recycle.cost.shortage import Change, halved

from .plan import TrainingPlan


def in_training(plan: TrainingPlan, model: Any) -> Iterator[Change]:
    """Of forward and backward passes; memory before anything that changes what is learned."""
    size, checkpointing = plan.micro_batch_size, plan.settings.gradient_checkpointing
    if size > 1:
        less = halved(size, plan.blocks_per_process)
        yield f"{plan.sections[0]}.micro_batch_size", less, size
    if checkpointing is not True:
        more = "selective" if size > 1 and not checkpointing else True
        yield "training.gradient_checkpointing", more, checkpointing
    yield from _of_streams(plan)
    yield from _of_blocks(plan, model)


def in_validation(plan: TrainingPlan, model: Any, batch_size: int) -> Iterator[Change]:
    """Of forward passes over validation documents."""
    if batch_size > 1:
        yield "evaluation.batch_size", halved(batch_size), batch_size
    yield from _of_streams(plan)
    yield from _of_blocks(plan, model)


def _of_streams(plan: TrainingPlan) -> Iterator[Change]:
    at_once = plan.at_once or plan.num_streams
    if at_once > 1:
        yield "stages.streams.at_once", halved(at_once), at_once


def _of_blocks(plan: TrainingPlan, model: Any) -> Iterator[Change]:
    if plan.block_size > 2:
        yield f"{plan.sections[1]}.block_size", plan.block_size // 2, plan.block_size
    if plan.all_weights:
        kind = ("streams", "prefixes", "all") if plan.active else ("adapt", "lora", "full")
        yield f"stages.{kind[0]}.train", *kind[1:]
    elif getattr(model.config, "quantization_config", None) is None:
        yield "backbone.quantization", "nf4", None
