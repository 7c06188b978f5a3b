"""What a recipe takes, from the model's config alone: `recycle plan`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from recycle.backbone.skeleton import load_skeleton
from recycle.cost import Gpu, PassCost, Work, total
from recycle.cost.forecast import Forecast, TrainingForecast
from recycle.cost.inference import Numbers, Request, estimate
from recycle.cost.scaling import paper_example, scale
from recycle.cost.shape import Shape, model_shape
from recycle.cost.training import (
    USABLE,
    Learner,
    largest_micro_batch,
    lora_parameters,
    operations,
    training_cost,
)
from recycle.recipe import Recipe, run_folder
from recycle.results import Estimates
from recycle.train import TrainingPlan

from .announcement import works
from .launch import check_shares
from .machine import gpu_here
from .parallel import in_parallel
from .plan import RunPlan, plan_on


def estimate_run(plan: RunPlan) -> Estimates:
    """What inference with each P of a run takes, on this machine's GPU or else the default one."""
    gpu, _ = gpu_here()
    skeleton, quantization = load_skeleton(plan.recipe.backbone)
    numbers = Numbers(plan.recipe.backbone.dtype, quantization)
    shape, p_values = model_shape(skeleton), (1, *plan.recipe.streams)
    prefix = plan.recipe.method.num_virtual_tokens
    return _estimates(shape, gpu, p_values, Request(), numbers, prefix)


def _estimates(
    shape: Shape,
    gpu: Gpu,
    p_values: tuple[int, ...],
    request: Request,
    numbers: Numbers,
    prefix: int,
) -> Estimates:
    return Estimates(
        gpu=gpu.name,
        dtype=numbers.dtype,
        batch=request.batch,
        input_tokens=request.input_tokens,
        output_tokens=request.output_tokens,
        estimates=tuple(estimate(shape, gpu, p, request, numbers, prefix) for p in p_values),
    )


def forecast(
    recipe: Recipe, gpu_name: str | None, p_values: tuple[int, ...], request: Request
) -> Forecast:
    """What inference and training take, and what a larger model would cost that is as good.

    Args:
        recipe: As it was asked for; its data are not read.
        gpu_name: Where; None takes this machine's, where its figures are known.
        p_values: For which inference is estimated, in rising order; none takes the recipe's, and 1.
        request: What is asked in inference.

    Raises:
        BackboneError, UnsupportedModelError: There is no such model, or streams cannot enter it.
        CostError: The GPU is not known.
        RunError: The recipe's dtype is none that weights can learn in, or its processes cannot
            share its batch or its weights.
    """
    gpu, chosen = gpu_here(gpu_name)
    backbone = recipe.backbone
    if backbone.dtype == "auto":
        backbone = backbone.model_copy(update={"dtype": gpu.settled_dtype})
    recipe = recipe.model_copy(update={"backbone": backbone})
    skeleton, quantization = load_skeleton(backbone)
    shape, numbers = model_shape(skeleton), Numbers(backbone.dtype, quantization)
    prefix = recipe.method.num_virtual_tokens
    p_values = p_values or (1, *recipe.streams)
    inference = _estimates(shape, gpu, p_values, request, numbers, prefix)

    processes = recipe.launch.processes or 1
    check_shares(recipe, processes)
    plan = in_parallel(plan_on(recipe, run_folder(recipe), "cuda"), processes, gpu.memory_gib)
    shards = processes if plan.sharded else 1
    adapt = recipe.stages.adapt
    lora = lora_parameters(skeleton, adapt.rank, adapt.target_modules)
    site = shape, numbers, gpu
    learners = {x.adapter: x.learner(shape, prefix, lora, shards) for x in plan.trainings}

    last = plan.stages[-1]
    bare = Learner((1,), 0, False, last.data.block_size, 0, shards=shards)

    weights = (skeleton.num_parameters(), numbers.bytes)
    all_weights = PassCost(0, 0, 0).with_all_weights(*weights).gib

    def size_of(training: TrainingPlan | None) -> int:
        settings = training.settings if training else last.training
        share, again = settings.batch_size // processes, settings.gradient_checkpointing
        if settings.micro_batch_size != "auto":
            return min(settings.micro_batch_size, share)
        if training is None:
            return 1
        more = all_weights * training.all_weights
        return largest_micro_batch(*site, learners[training.adapter], share, again, more) or 1

    def cost_of(training: TrainingPlan | None) -> PassCost:
        settings = training.settings if training else last.training
        learner = learners[training.adapter] if training else bare
        return training_cost(*site, learner, size_of(training), settings.gradient_checkpointing)

    data = [stage.data for stage in plan.stages]  # a block of each document is read
    found, alone = works(
        plan,
        test=data[-1].test_documents * data[-1].block_size,
        validation=[x.validation_documents * x.block_size for x in data],
        cost_of=cost_of,
        weights=weights,
    )
    seconds, gib = total([*found, alone])
    trainings = tuple(
        _training(
            training, learners[training.adapter], work, cost_of(training), site, size_of, processes
        )
        for training, work in zip(plan.trainings, found, strict=True)
    )
    most, head = p_values[-1], shape.head * numbers.bytes / 2**30
    config = skeleton.config.get_text_config(decoder=True)
    return Forecast(
        **dict(inference),
        model=backbone.id,
        model_type=skeleton.config.model_type,
        parameters=skeleton.num_parameters(),
        non_embedding_parameters=round(shape.non_embedding),
        output_head_gib=head,
        gpu_memory_gib=gpu.memory_gib,
        gpu_chosen=chosen,
        quantization=quantization,
        num_virtual_tokens=prefix,
        training=trainings,
        processes=processes,
        sharded=plan.sharded,
        training_seconds=seconds / processes,
        training_memory_gib=gib,
        scaling=scale(shape, gpu, most, (request,), numbers, prefix) if most > 1 else None,
        paper=paper_example(),
        notes=tuple(_notes(config, inference, head, trainings, gpu)),
    )


def _training(
    training: TrainingPlan,
    learner: Learner,
    work: Work,
    frozen: PassCost,
    site: tuple[Shape, Numbers, Gpu],
    size_of: Callable[[TrainingPlan], int],
    processes: int,
) -> TrainingForecast:
    """One training; `frozen` is its cost without weights that learn."""
    settings, all_weights = training.settings, site[0].parameters * training.all_weights
    per_token, _ = operations(site[0], learner, settings.gradient_checkpointing)
    more, share = work.cost.gib - frozen.gib, settings.batch_size // processes
    return TrainingForecast(
        name=training.adapter,
        p_values=training.p_values,
        tokens=work.learned,
        learned_parameters=round(all_weights) + learner.learned,
        flops=per_token * work.learned * work.cost.learning / frozen.learning,
        seconds=work.learned * work.cost.learning / processes,
        memory_gib=work.cost.gib,
        micro_batch_size=size_of(training),
        fits=largest_micro_batch(*site, learner, share, False, more),
        fits_with_checkpointing=largest_micro_batch(*site, learner, share, True, more),
    )


def _notes(
    config: Any,
    inference: Estimates,
    head: float,
    trainings: Sequence[TrainingForecast],
    gpu: Gpu,
) -> Iterator[str]:
    """What to watch."""
    window = getattr(config, "max_position_embeddings", None)
    length = inference.input_tokens + inference.output_tokens
    if window and length > window:
        yield (
            f"{length:,} tokens in and out are more than the model's window of {window:,} "
            "(max_position_embeddings)."
        )
    usable = USABLE * gpu.memory_gib
    too_large = [str(x.p) for x in inference.estimates if x.memory_gib + head > usable]
    if too_large:
        yield (
            f"P = {', '.join(too_large)}: too large for the {gpu.memory_gib:g} GiB of {gpu.name}, "
            f"of which {100 * USABLE:.0f} % can be used. Try backbone.quantization=nf4."
        )
    for x in trainings:
        if x.memory_gib <= usable:
            continue
        advice = "no micro-batch fits; try backbone.quantization=nf4 or shorter blocks"
        if x.fits_with_checkpointing:
            advice = f"set training.micro_batch_size={x.fits_with_checkpointing} and "
            advice += "training.gradient_checkpointing=true"
        if x.fits:
            advice = f"set training.micro_batch_size={x.fits}"
        yield f"Training {x.name} is too large for {gpu.name}: {advice}."
