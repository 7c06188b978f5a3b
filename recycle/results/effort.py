"""What each row of the table cost to train, and the order of the rows."""

from collections.abc import Iterable, Sequence

from .comparison import ADAPTED, BACKBONE, CONTROL, LORA, WEIGHTS, Measurement
from .schema import TrainingRecord

_FIRST = (BACKBONE, ADAPTED, LORA, WEIGHTS, CONTROL)


def with_training(
    measurements: Iterable[Measurement], trainings: Sequence[TrainingRecord]
) -> list[Measurement]:
    """Measurements with the effort of all trainings behind each, in the order of the table.

    Streams on adapted weights have the first stage behind them as well. Of a row that was measured
    twice, the later measurement counts.

    Args:
        measurements: Of one run.
        trainings: Its records.
    """
    rows = {x.name: x for x in measurements}
    found = []
    for row in sorted(rows.values(), key=_place):
        behind = [x for x in trainings if row.name in rows_of_training(x)]
        if behind and ADAPTED in rows and row.name not in (ADAPTED, LORA, WEIGHTS):
            behind += [x for x in trainings if ADAPTED in rows_of_training(x)]
        flops = [x.tokens * x.flops_per_token for x in behind if x.flops_per_token is not None]
        effort = {
            "train_seconds": sum(x.wall_seconds for x in behind) if behind else None,
            "train_flops": sum(flops) if flops else None,
            "speed": row.speed.model_copy(
                update={"train_tokens_per_second": behind[0].tokens_per_second if behind else None}
            ),
        }
        found.append(row.model_copy(update=effort))
    return found


def _place(row: Measurement) -> int:
    return _FIRST.index(row.name) if row.name in _FIRST else len(_FIRST) + row.num_streams


def rows_of_training(training: TrainingRecord) -> tuple[str, ...]:
    """The rows that a training made."""
    alone = {"adapted": (ADAPTED,), "compared": (LORA, WEIGHTS), "control": (CONTROL,)}
    return alone.get(training.name, tuple(f"P = {p}" for p in training.p_values))
