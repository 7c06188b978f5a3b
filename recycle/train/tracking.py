"""Numbers of a training for trackio, TensorBoard and wandb, by transformers' integrations.

All that is tracked of a step goes there in one call, so that a process that goes on after a kill
knows by the step alone what is there. The integrations put `train/` in front of each name, and
`eval/` in place of `eval_`.
"""

import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from recycle.evaluate.diversity import StreamWatch
from recycle.parscale import ActiveStreams
from recycle.results import TrainingRecord

from .checkpoints import TrainingError
from .plan import Tracking, TrainingPlan


def trackers(tracking: Tracking | None) -> list[TrainerCallback]:
    """What a training is tracked with; of several processes the first alone writes anything.

    The package is imported here, and not where nothing is tracked.
    """
    if tracking is None:
        return []
    kinds = {"trackio": _Trackio, "tensorboard": _TensorBoard, "wandb": _Wandb}
    return [kinds[tracking.to](tracking)]


def hand_on(trainer: Trainer, numbers: dict[str, float]) -> None:
    """Give a step's numbers to the callbacks, and empty them.

    `Trainer.log` would also keep them in its state, which is part of every checkpoint.
    """
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, numbers)
    numbers.clear()


def gradient_norms(groups: Iterable[Sequence[nn.Parameter]]) -> Tensor:
    """The norm of each group's gradients before they are clipped, `[groups]`, on the device."""
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    return torch.stack([get_total_norm(group) for group in gradients])


def of_step(
    plan: TrainingPlan,
    record: TrainingRecord,
    loss: float,
    losses: Sequence[float],
    norms: Mapping[str, float],
    rates: Sequence[float],
) -> dict[str, float]:
    """What is tracked of an optimiser step.

    Args:
        plan: The training's.
        record: With this step in it.
        loss: The weighted mean of the next, in nats per token.
        losses: Of each P.
        norms: Of the gradients, by group.
        rates: Learning rates of these groups.
    """
    found = {"tokens": float(record.tokens), "loss": loss}
    found["tokens_per_second"] = record.tokens_per_second or 0.0
    found |= {f"loss/{short(row)}": x for row, x in zip(plan.rows, losses, strict=True)}
    found["gradient_norm"] = math.hypot(*norms.values())
    found |= {f"gradient_norm/{group}": norm for group, norm in norms.items()}
    return found | {f"learning_rate/{group}": x for group, x in zip(norms, rates, strict=True)}


def of_validation(
    plan: TrainingPlan, means: Mapping[str, float], watch: StreamWatch
) -> dict[str, float]:
    """What is tracked of a validation: losses, and of the streams of each P their ρ and weights.

    Args:
        plan: The training's.
        means: Validation loss of each row.
        watch: It has seen these passes.
    """
    found = {f"eval_loss/{short(row)}": mean for row, mean in means.items()}
    for row, p in zip(plan.rows, plan.p_values, strict=True):
        use = watch.use(ActiveStreams(plan.adapter, p, (p,)))
        if use is None:
            continue
        if use.error_correlation is not None:
            found[f"eval_error_correlation/{short(row)}"] = use.error_correlation
        found |= {f"eval_weights/{short(row)}/{i}": x for i, x in enumerate(use.weights)}
    return found


def short(row: str) -> str:
    """A row's name without what TensorBoard would replace: P4, control, LoRA."""
    return row.replace(" = ", "").replace(" ", "_")


class _Once(TrainerCallback):
    """Takes the first call of each step, of those after `done`; the Trainer's own last one is none.

    A process that goes on after a kill repeats the steps since the last checkpoint, alike.
    """

    done = -1

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.done:
            super().on_log(args, state, control, **kwargs)
            self.done = state.global_step


class _TensorBoard(_Once, TensorBoardCallback):
    """Event files in a folder for each training; what a killed process wrote too much is hidden."""

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            first = state.global_step + 1 if state.global_step else 0
            place = self.tracking.folder / self.tracking.training
            self.tb_writer = self._SummaryWriter(str(place), purge_step=first)
        super().on_train_begin(args, state, control, **kwargs)


class _Trackio(_Once, TrackioCallback):
    """A local database in the folder."""

    def __init__(self, tracking: Tracking) -> None:
        # Trackio reads its folder when it is imported. A Space would have to be asked for here.
        os.environ.setdefault("TRACKIO_DIR", str(tracking.folder))
        for elsewhere in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            os.environ.pop(elsewhere, None)
        super().__init__()
        self.tracking = tracking

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        with redirect_stdout(StringIO()):
            super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            from trackio.sqlite_storage import SQLiteStorage

            lines = SQLiteStorage.get_logs(self.tracking.project, self.tracking.run)
            self.done = max((int(x["train/global_step"]) for x in lines), default=-1)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        with redirect_stdout(StringIO()):
            super().on_train_end(args, state, control, **kwargs)


class _Wandb(_Once, WandbCallback):
    """A run for each training, with an id in the folder, by which a later process goes on with it.

    Offline the later process cannot see what is there, and repeats some steps.
    """

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        wandb, tracking = self._wandb, self.tracking
        if state.is_world_process_zero:
            tracking.folder.mkdir(exist_ok=True)
            known = tracking.folder / f"{tracking.training}.wandb"
            if not known.exists():
                known.write_text(uuid.uuid4().hex)
            try:
                wandb.init(
                    project=os.getenv("WANDB_PROJECT", tracking.project),
                    dir=os.getenv("WANDB_DIR", str(tracking.folder)),
                    name=tracking.run,
                    id=known.read_text(),
                    resume="allow",
                    settings=wandb.Settings(silent=True, console="off"),
                )
            except wandb.errors.Error as error:
                raise TrainingError(
                    f"wandb cannot start: {str(error).rstrip('.')}. Or keep what it tracks here "
                    "with WANDB_MODE=offline, or set logging.to=none."
                ) from None
            self.done = wandb.run.summary.get("train/global_step", -1)
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._wandb.run is not None:  # the next training is another run
            self._wandb.finish()
