"""What a run will do: all that a recipe, the machine and the run folder decide, settled once."""

from dataclasses import dataclass
from pathlib import Path

from recycle.family import CONTROL, NESTED
from recycle.recipe import Recipe, training_steps
from recycle.train import TrainingPlan

from .folder import CHECKPOINTS, Found
from .machine import device_of, with_dtype


@dataclass(frozen=True)
class RunPlan:
    """A run, before anything heavy is done for it."""

    recipe: Recipe
    folder: Path
    device: str
    trainings: tuple[TrainingPlan, ...]
    """One after the other. The one with the most streams comes first, so that what does not fit
    into memory shows at once."""

    @property
    def train_blocks(self) -> int:
        return self.trainings[0].steps * self.recipe.training.batch_size

    @property
    def num_starts(self) -> int:
        """Texts that streams start from."""
        return max(self.recipe.streams) if self.recipe.method.init == "text" else 0


def plan_run(found: Found) -> RunPlan:
    """The plan of a run.

    Raises:
        RunError: This machine cannot carry it out.
    """
    device = device_of(found.recipe.launch)
    backbone = with_dtype(found.recipe.backbone, device)
    recipe = found.recipe.model_copy(update={"backbone": backbone})
    return RunPlan(recipe, found.folder, device, _trainings(recipe, found.folder / CHECKPOINTS))


def _trainings(recipe: Recipe, checkpoints: Path) -> tuple[TrainingPlan, ...]:
    settings = recipe.training
    served: dict[str, tuple[int, ...]] = {NESTED: recipe.streams}
    if not recipe.method.nested:
        served = {f"p{p}": (p,) for p in reversed(recipe.streams)}
    if settings.control:
        served[CONTROL] = (1,)
    return tuple(
        TrainingPlan(
            adapter=adapter,
            p_values=p_values,
            steps=training_steps(recipe),
            block_size=recipe.data.block_size,
            learning_rates={
                "prefix": settings.control_learning_rate
                if adapter == CONTROL
                else settings.prefix_learning_rate,
                "aggregator": settings.aggregator_learning_rate,
            },
            settings=settings,
            log_steps=recipe.logging.steps,
            folder=checkpoints / adapter,
        )
        for adapter, p_values in served.items()
    )
