"""What a run will take, said before it: the same sum for costs that are measured or computed."""

from collections.abc import Callable, Sequence
from typing import Any

from recycle import world
from recycle.cost import PassCost, Work, total
from recycle.cost.passes import pass_cost
from recycle.cost.training import logits_gib
from recycle.evaluate import OutputHead
from recycle.progress import Silent, duration
from recycle.train import TrainingPlan, add_lora, add_streams, steps_done

from .materials import Materials
from .plan import RunPlan


def works(
    plan: RunPlan,
    test: int,
    validation: Sequence[int],
    cost_of: Callable[[TrainingPlan | None], PassCost],
    weights: tuple[int, int],
    steps_of: Callable[[TrainingPlan], int] = lambda training: 0,
) -> tuple[list[Work], Work]:
    """What a run has to do: its trainings, and the measurement of the backbone.

    Args:
        plan: The run's.
        test: Tokens of all test documents.
        validation: Tokens of the validation documents of each stage.
        cost_of: What a token takes in a training with the weights frozen; None is the backbone.
        weights: The backbone's parameters, and bytes of one.
        steps_of: Steps of a training that are done.
    """
    found = []
    for training in plan.trainings:
        done = steps_of(training)
        cost, validations = cost_of(training), training.validations(done)
        found.append(
            Work(
                training.adapter,
                learned=(training.steps - done) * training.tokens_per_step,
                read=test + validations * validation[0 if training is plan.adapt else -1],
                cost=cost.with_all_weights(*weights) if training.all_weights else cost,
                done=done * training.tokens_per_step,
            )
        )
    return found, Work("backbone", 0, test, cost_of(None))


def announce(
    plan: RunPlan, materials: Materials, model: Any, progress: Silent
) -> tuple[float, float]:
    """Say from where a run goes on, and what the rest of it will take.

    Args:
        plan: The run's.
        materials: Its data.
        model: The backbone; it is given back as it was.
        progress: Where it is said.

    Returns:
        The expected seconds and GiB.
    """
    progress.start("estimating time and memory")
    splits = materials.splits
    alone = _cost(plan, model, None)
    lora = alone
    if plan.compare or plan.adapt:
        training = plan.compare or plan.adapt
        assert training is not None
        with_lora = add_lora(model, training, plan.recipe.stages.adapt)
        lora = _cost(plan, with_lora, None)
        model = with_lora.unload()
    first = plan.streams[0]
    random = plan.recipe.method.model_copy(update={"init": "random"})
    frozen = first.frozen()
    with_streams = add_streams(model, frozen, random, splits.starts, None)
    streams = _cost(plan, with_streams, frozen.active)
    with_streams.unload().requires_grad_(False)

    def cost_of(training: TrainingPlan | None) -> PassCost:
        if training is None or training.active is None:
            return alone if training is None else lora
        most = max(first.num_streams - 1, 1)
        return streams.between(alone, (training.num_streams - 1) / most)

    trainings, backbone = works(
        plan,
        test=sum(len(document.input_ids) for document in splits.test),
        validation=[sum(len(x.input_ids) for x in each) for each in splits.validation],
        cost_of=cost_of,
        weights=(model.num_parameters(), model.dtype.itemsize),
        steps_of=lambda training: world.once(lambda: steps_done(training)),
    )
    seconds, gib = total([*trainings, backbone])
    seconds /= world.size()
    gib = max(gib, alone.gib + _comparing(plan, model))
    parts = [
        f"{x.name} on {x.learned:,} tokens"
        + (f" of {x.learned + x.done:,}, going on from a checkpoint" if x.done else "")
        for x in trainings
    ]
    memory = f"{gib:.1f} GiB of {'GPU ' if plan.device == 'cuda' else ''}memory"
    progress.say(
        f"Expected: {duration(seconds)} and {memory}, for training {', '.join(parts)}, and the "
        "comparison"
    )
    return seconds, gib


def _comparing(plan: RunPlan, model: Any) -> float:
    """GiB of logits in a pass over test documents."""
    positions = plan.recipe.evaluation.batch_size * plan.stages[-1].data.block_size
    return logits_gib(positions, model.get_input_embeddings().num_embeddings)


def _cost(plan: RunPlan, model: Any, active: Any) -> PassCost:
    stage = plan.stages[0 if active is None else -1]
    size = stage.training.micro_batch_size
    at_once = None if active is None else plan.streams[0].at_once
    with OutputHead(model, at_once) as head:
        return pass_cost(
            model,
            head.log_probs,
            active,
            block_size=stage.data.block_size,
            micro_batch_size=1 if size == "auto" else size,
            gradient_checkpointing=stage.training.gradient_checkpointing,
        )
