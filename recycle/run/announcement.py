"""What the rest of a run will take, said before it."""

from typing import Any

from recycle.cost import PassCost, pass_cost
from recycle.evaluate import OutputHead
from recycle.progress import Silent, duration
from recycle.train import add_lora, add_streams, steps_done

from .materials import Materials
from .plan import RunPlan

# A step of all weights against one of a LoRA: three products of matrices for two.
ALL_WEIGHTS = 1.5


def announce(plan: RunPlan, materials: Materials, model: Any, progress: Silent) -> float:
    """Say from where a run goes on, and what the rest of it will take.

    Args:
        plan: The run's.
        materials: Its data.
        model: The backbone; it is given back as it was.
        progress: Where it is said.

    Returns:
        The expected seconds.
    """
    progress.start("estimating time and memory")
    test = sum(len(document.input_ids) for document in materials.splits.test)
    alone = _cost(plan, model, None)
    lora = streams = alone
    if plan.compare or plan.adapt:
        training = plan.compare or plan.adapt
        assert training is not None
        with_lora = add_lora(model, training, plan.recipe.stages.adapt)
        lora = _cost(plan, with_lora, None)
        model = with_lora.unload()
    first = plan.streams[0]
    random = plan.recipe.method.model_copy(update={"init": "random"})
    frozen = first.frozen()
    with_streams = add_streams(model, frozen, random, materials.splits.starts, None)
    streams = _cost(plan, with_streams, frozen.active)
    with_streams.unload().requires_grad_(False)

    seconds, parts = test * alone.reading, []
    for training in plan.trainings:
        done = steps_done(training)
        learned = (training.steps - done) * training.tokens_per_step
        validation = materials.splits.validation[0 if training is plan.adapt else -1]
        read = training.validations(done) * sum(len(x.input_ids) for x in validation) + test
        cost = lora
        if training.active is not None:
            most = max(first.num_streams - 1, 1)
            cost = streams.between(alone, (training.num_streams - 1) / most)
        slower = ALL_WEIGHTS if training.all_weights else 1.0
        seconds += learned * cost.learning * slower + read * cost.reading
        begun = f" of {training.tokens:,}, going on from a checkpoint" if done else ""
        parts.append(f"{training.adapter} on {learned:,} tokens{begun}")
    gib = max(lora.gib, streams.gib)
    if any(training.all_weights for training in plan.trainings):
        # In float32, with a gradient and two moments.
        gib += (16 - model.dtype.itemsize) * model.num_parameters() / 2**30
    memory = f"{gib:.1f} GiB of {'GPU ' if plan.device == 'cuda' else ''}memory"
    progress.say(
        f"Expected: {duration(seconds)} and {memory}, for training {', '.join(parts)}, and the "
        "comparison"
    )
    return seconds


def _cost(plan: RunPlan, model: Any, active: Any) -> PassCost:
    stage = plan.stages[0 if active is None else -1]
    with OutputHead(model) as head:
        return pass_cost(
            model,
            head.log_probs,
            active,
            block_size=stage.data.block_size,
            micro_batch_size=stage.training.micro_batch_size,
            gradient_checkpointing=stage.training.gradient_checkpointing,
        )
