"""The tables of a result, as text and for the terminal."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .comparison import BACKBONE, Difference, ModelResult, paired_difference
from .schema import Results, precision

if TYPE_CHECKING:
    from rich.table import Table

# With line breaks for the terminal; `_headings` takes them out.
_COLUMNS = (
    "model",
    "held-out\nloss",
    "− backbone\n± se",
    "− control\n± se",
    "adapter\nparams",
    "KV bytes\n/token",
)
_SPEED = "train/prefill\n/decode\ntokens/s"
_FIRST_COLUMNS = (
    "model",
    "run\nloss",
    "loss\nnow",
    "now − run\n± se",
    "run:\n− backbone ± se",
    "now:\n− backbone ± se",
)


def tabulate(results: Results) -> list[tuple[str, ...]]:
    """The table as text: the headings, then one row for each model.

    The column of speeds is there where prefill or decoding was measured.
    """
    speed = _has_speed(results)
    rows = [
        (
            model.name,
            f"{model.loss:.4f}",
            format_difference(model.minus_backbone),
            format_difference(model.minus_control),
            f"{model.adapter_parameters:,}",
            f"{model.kv_bytes_per_token:,}",
            *[" / ".join("–" if x is None else f"{x:,.1f}" for x in _rates(model))][:speed],
        )
        for model in results.models
    ]
    return [_headings((*_COLUMNS, *[_SPEED][:speed])), *rows]


def rich_table(results: Results) -> "Table":
    """The table for a terminal of 80 columns or more, with parameters and speeds rounded."""
    speed = _has_speed(results)
    notes = ["Loss in nats per token; lower is better.", shared_training(results)]
    rows = [
        (
            model.name,
            f"{model.loss:.4f}",
            format_difference(model.minus_backbone).replace(" ", ""),
            format_difference(model.minus_control).replace(" ", ""),
            _short_count(model.adapter_parameters),
            f"{model.kv_bytes_per_token:,}",
            *["/".join(map(_short_rate, _rates(model)))][:speed],
        )
        for model in results.models
    ]
    columns = (*_COLUMNS, *[_SPEED][:speed])
    return _rich(results.name, "\n".join(filter(None, notes)), columns, rows)


def tabulate_again(results: Results) -> list[tuple[str, ...]]:
    """A later measurement beside the run's own: headings and rows; nothing for the run's own."""
    if results.first is None:
        return []
    losses, differences = results.first.losses, results.minus_first()
    rows = [
        (
            model.name,
            f"{statistics.fmean(losses[model.name]):.4f}",
            f"{model.loss:.4f}",
            format_difference(differences[model.name]),
            _minus(losses, model.name, BACKBONE),
            format_difference(model.minus_backbone),
        )
        for model in results.models
    ]
    return [_headings(_FIRST_COLUMNS), *rows]


def rich_first_table(results: Results) -> "Table":
    """The same for a terminal of 80 columns or more."""
    rows = [
        tuple(cell.replace(" ± ", "±") if column else cell for column, cell in enumerate(row))
        for row in tabulate_again(results)[1:]
    ]
    caption = "now − run below zero: better than in the run."
    title = precisions(results).replace(", ", ",\n")  # both lines fit above the narrowest table
    return _rich(title, caption, _FIRST_COLUMNS, rows)


def precisions(results: Results) -> str:
    """In which precisions of the backbone the adapters were trained and are measured."""
    trained = precision(results.backbone if results.first is None else results.first)
    return f"Trained on {trained}, measured on {precision(results.backbone)}"


def _minus(losses: dict[str, tuple[float, ...]], name: str, other: str) -> str:
    if name == other:
        return ""
    return format_difference(paired_difference(losses[name], losses[other]))


def _rich(
    title: str, caption: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=Text(title), caption=Text(caption), box=SIMPLE_HEAD, show_edge=False, padding=0
    )
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def shared_training(results: Results) -> str:
    """Whose training speed stands in the rows of a nested family; nothing where none does."""
    if not _has_speed(results):
        return ""
    shown = {x.num_streams for x in results.models if x.speed.train_tokens_per_second is not None}
    return " ".join(
        f"The train tokens/s of P = {', '.join(map(str, training.p_values))} is that of the one "
        "training they share."
        for training in results.training
        if len(training.p_values) > 1 and shown.issuperset(training.p_values)
    )


def format_difference(difference: Difference | None) -> str:
    """`−0.1340 ± 0.0100`, with `?` for an error that cannot be told; or nothing."""
    if difference is None:
        return ""
    if not math.isfinite(difference.mean):
        return "not finite"
    mean = f"{difference.mean:+.4f}".replace("-", "−")
    error = difference.standard_error
    return f"{mean} ± ?" if error is None else f"{mean} ± {error:.4f}"


def _headings(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(column.replace("\n/", "/").replace("\n", " ") for column in columns)


def _has_speed(results: Results) -> bool:
    """Whether prefill or decoding was measured. Training alone stands with the trainings."""
    return any(rate is not None for model in results.models for rate in _rates(model)[1:])


def _rates(model: ModelResult) -> tuple[float | None, float | None, float | None]:
    """Training, prefill and decoding."""
    speed = model.speed
    return (
        speed.train_tokens_per_second,
        speed.prefill_tokens_per_second,
        speed.decode_tokens_per_second,
    )


def _short_rate(rate: float | None) -> str:
    """`5.9`, `579`, `12k`."""
    if rate is None:
        return "–"
    return f"{rate / 1e3:.0f}k" if rate >= 1e4 else f"{rate:.{int(rate < 100)}f}"


def _short_count(count: int) -> str:
    """`48`, `553k`, `1.77M`."""
    if count >= 1e6:
        return f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}k" if count >= 1e3 else str(count)
