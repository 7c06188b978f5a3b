"""What a run will do: all that a recipe, the machine and the run folder decide, settled once."""

from dataclasses import dataclass
from pathlib import Path

from recycle.data import StageData
from recycle.family import CONTROL, NESTED
from recycle.recipe import Recipe, Stage, stages
from recycle.results import ADAPTED, LORA, WEIGHTS
from recycle.train import TrainingPlan
from recycle.train.plan import Tracking

from .folder import CHECKPOINTS, Found, RunError
from .machine import device_of, with_dtype

LOGS = "logs"  # what training is tracked in
COMPARED = "compared"  # the training, and its folder, of the weights that streams are compared with


@dataclass(frozen=True)
class RunPlan:
    """A run, before anything heavy is done for it."""

    recipe: Recipe
    folder: Path
    device: str
    stages: tuple[Stage, ...]
    """The first stage, where it trains something, and the streams'."""
    compare: TrainingPlan | None
    """Weights alone, on the tokens of both stages."""
    adapt: TrainingPlan | None
    """The first stage."""
    streams: tuple[TrainingPlan, ...]
    """One after the other. The one with the most streams comes first, so that what does not fit
    into memory shows at once."""
    sharded: bool = False
    """Whether each process holds a part of the backbone, see `placement.py`."""

    @property
    def trainings(self) -> tuple[TrainingPlan, ...]:
        """All of them, in their order."""
        return tuple(x for x in (self.compare, self.adapt, *self.streams) if x is not None)

    @property
    def data(self) -> tuple[StageData, ...]:
        """What each stage asks of the data."""
        return tuple(StageData(stage.data, stage.blocks) for stage in self.stages)

    @property
    def num_starts(self) -> int:
        """Texts that streams start from."""
        return max(self.recipe.streams) if self.recipe.method.init == "text" else 0

    @property
    def leaves_backbone(self) -> bool:
        """Whether other weights than the backbone's have a row in the table."""
        trained = self.compare or self.adapt or self.streams[0].all_weights
        return bool(trained or self.brings_adapter)

    @property
    def brings_adapter(self) -> bool:
        """Whether the weights were adapted elsewhere."""
        return bool(self.recipe.backbone.adapter or self.recipe.stages.streams.start)


def plan_run(found: Found) -> RunPlan:
    """The plan of a run on this machine.

    Raises:
        RunError: This machine cannot carry it out.
    """
    device = device_of(found.recipe.launch)
    backbone = with_dtype(found.recipe.backbone, device)
    return plan_on(found.recipe.model_copy(update={"backbone": backbone}), found.folder, device)


def plan_on(recipe: Recipe, folder: Path, device: str) -> RunPlan:
    """The plan of a run on any machine.

    Args:
        recipe: With a settled dtype.
        folder: The run's.
        device: "cpu", "cuda" or "mps".

    Raises:
        RunError: The dtype is none that weights can learn in.
    """
    backbone = recipe.backbone
    trains_all = recipe.stages.adapt.train == "full" or recipe.stages.streams.train == "all"
    if trains_all and backbone.dtype == "float16":
        raise RunError(
            "Weights that learn compute in bfloat16 or float32, and backbone.dtype=float16. Set "
            "one of these, or train a LoRA and prefixes."
        )
    in_order, checkpoints = stages(recipe), folder / CHECKPOINTS
    adapt = compare = None
    if recipe.stages.adapt.train != "none":
        adapt = _training(recipe, in_order[0], "adapted", (ADAPTED,), (1,), checkpoints)
    if recipe.evaluation.compare:
        compare = _compared(recipe, in_order, trains_all, checkpoints)
    served: dict[str, tuple[int, ...]] = {NESTED: recipe.streams}
    if not recipe.stages.streams.nested:
        served = {f"p{p}": (p,) for p in reversed(recipe.streams)}
    if recipe.stages.streams.control:
        served[CONTROL] = (1,)
    streams = tuple(
        _training(
            recipe,
            in_order[-1],
            adapter,
            (CONTROL,) if adapter == CONTROL else tuple(f"P = {p}" for p in p_values),
            p_values,
            checkpoints,
        )
        for adapter, p_values in served.items()
    )
    return RunPlan(recipe, folder, device, in_order, compare, adapt, streams)


def _compared(
    recipe: Recipe, in_order: tuple[Stage, ...], trains_all: bool, checkpoints: Path
) -> TrainingPlan:
    """One schedule over the tokens of both stages, in steps of the first one's size."""
    method = "full" if trains_all else "lora"
    first, rows = in_order[0], sum(stage.blocks for stage in in_order)
    own = recipe.stages.adapt.model_copy(update={"train": method})
    alone = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"adapt": own})})
    # The rate of all weights beside the streams, or else the first stage's.
    rate = in_order[-1].rates.get(method) or stages(alone)[0].rates[method]
    return TrainingPlan(
        adapter=COMPARED,
        rows=(WEIGHTS if trains_all else LORA,),
        p_values=(1,),
        steps=rows // first.training.batch_size,
        block_size=first.data.block_size,
        learning_rates={method: recipe.evaluation.compare_learning_rate or rate},
        settings=first.training,
        log_steps=recipe.logging.steps,
        folder=checkpoints / COMPARED,
        dtype=recipe.backbone.dtype,
        in_order=True,
        tracking=_tracking(recipe, checkpoints, COMPARED),
        sections=first.sections,
    )


def _training(
    recipe: Recipe,
    stage: Stage,
    name: str,
    rows: tuple[str, ...],
    p_values: tuple[int, ...],
    checkpoints: Path,
) -> TrainingPlan:
    rates = dict(stage.rates)
    control = rates.pop("control", None)
    if name == CONTROL:
        assert control is not None
        rates["prefix"] = control
    return TrainingPlan(
        adapter=name,
        rows=rows,
        p_values=p_values,
        steps=stage.steps,
        block_size=stage.data.block_size,
        learning_rates=rates,
        settings=stage.training,
        log_steps=recipe.logging.steps,
        folder=checkpoints / name,
        dtype=recipe.backbone.dtype,
        loss_weights=recipe.stages.streams.loss_weights,
        own_loss=recipe.stages.streams.own_loss if p_values[-1] > 1 else 0.0,
        tracking=_tracking(recipe, checkpoints, name),
        at_once=recipe.stages.streams.at_once if p_values[-1] > 1 else None,
        sections=stage.sections,
    )


def _tracking(recipe: Recipe, checkpoints: Path, training: str) -> Tracking | None:
    to = recipe.logging.to
    return None if to == "none" else Tracking(to, recipe.name, checkpoints.parent / LOGS, training)
