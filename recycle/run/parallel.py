"""What `launch.parallel` means for a run: DDP, or FSDP where a GPU does not hold the backbone."""

from dataclasses import replace

import torch

from recycle.backbone.skeleton import load_skeleton
from recycle.cost.inference import Numbers
from recycle.cost.shape import model_shape
from recycle.cost.training import USABLE, lora_parameters, memory

from .folder import RunError
from .plan import RunPlan


def in_parallel(plan: RunPlan, processes: int, gpu_gib: float | None = None) -> RunPlan:
    """The plan with `sharded` settled; alone, a process holds a whole model.

    Args:
        plan: The run's.
        processes: How many carry it out.
        gpu_gib: Memory of the GPU that each of them has; None is this machine's.

    Raises:
        RunError: A model is to be shared out in which all weights learn, or which is quantised.
    """
    parallel = plan.recipe.launch.parallel
    if processes == 1 or parallel == "ddp":
        return plan
    learn = any(training.all_weights for training in plan.trainings)
    if parallel == "auto":
        sharded = plan.device == "cuda" and not learn and not _fits(plan, gpu_gib)
        return replace(plan, sharded=sharded)
    if learn:
        raise RunError(
            "launch.parallel=fsdp shares out weights that are frozen, and here all of them learn. "
            "Set launch.parallel=ddp; or train a LoRA and prefixes, with stages.adapt.train=lora "
            "and stages.streams.train=prefixes."
        )
    if (quantization := load_skeleton(plan.recipe.backbone)[1]) is not None:
        raise RunError(
            f"launch.parallel=fsdp cuts up the weights of layers, and those in {quantization} are "
            "not cut up. Set launch.parallel=ddp, or backbone.quantization=null."
        )
    return replace(plan, sharded=True)


def _fits(plan: RunPlan, gpu_gib: float | None) -> bool:
    """Whether one GPU has room for the whole backbone in every training, a block at a time.

    Quantised weights are not shared out, so they have to fit.
    """
    recipe = plan.recipe
    skeleton, quantization = load_skeleton(recipe.backbone)
    if quantization is not None:
        return True
    shape, numbers = model_shape(skeleton), Numbers(recipe.backbone.dtype)
    adapt, prefix = recipe.stages.adapt, recipe.method.num_virtual_tokens
    lora = lora_parameters(skeleton, adapt.rank, adapt.target_modules)
    if gpu_gib is None:
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return all(
        memory(shape, numbers, x.learner(shape, prefix, lora), 1, again) <= USABLE * gpu_gib
        for x in plan.trainings
        for again in [x.settings.gradient_checkpointing]
    )
