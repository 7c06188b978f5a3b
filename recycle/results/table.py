"""Results -> the table, as text and for the terminal."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .comparison import BACKBONE, Difference, ModelResult, paired_difference
from .schema import Results, precision

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "model",
    "held-out loss",
    "− backbone ± se",
    "− control ± se",
    "adapter params",
    "KV bytes/token",
    "train / prefill / decode tokens/s",
)
_NARROW_COLUMNS = (
    "model",
    "held-out\nloss",
    "− backbone\n± se",
    "− control\n± se",
    "adapter\nparams",
    "KV bytes\n/token",
    "train/prefill\n/decode\ntokens/s",
)
FIRST_COLUMNS = (
    "model",
    "loss in the run",
    "loss now",
    "now − run ± se",
    "run: − backbone ± se",
    "now: − backbone ± se",
)
_NARROW_FIRST_COLUMNS = (
    "model",
    "run\nloss",
    "loss\nnow",
    "now − run\n± se",
    "run:\n− backbone ± se",
    "now:\n− backbone ± se",
)


def table(results: Results) -> list[tuple[str, ...]]:
    """The rows under `COLUMNS`, one for each model, as text."""
    return [
        (
            model.name,
            f"{model.loss:.4f}",
            format_difference(model.minus_backbone),
            format_difference(model.minus_control),
            f"{model.adapter_parameters:,}",
            f"{model.kv_bytes_per_token:,}",
            " / ".join(f"{rate:,.1f}" if rate is not None else "–" for rate in _rates(model)),
        )
        for model in results.models
    ]


def rich_table(results: Results) -> "Table":
    """The table for a terminal of 80 columns or more, with parameters and speeds rounded."""
    notes = ["Loss in nats per token; lower is better.", shared_training(results)]
    rows = [
        (
            model.name,
            f"{model.loss:.4f}",
            format_difference(model.minus_backbone).replace(" ", ""),
            format_difference(model.minus_control).replace(" ", ""),
            _short_count(model.adapter_parameters),
            f"{model.kv_bytes_per_token:,}",
            "/".join(map(_short_rate, _rates(model))),
        )
        for model in results.models
    ]
    return _rich(results.name, "\n".join(filter(None, notes)), _NARROW_COLUMNS, rows)


def first_table(results: Results) -> list[tuple[str, ...]]:
    """The rows under `FIRST_COLUMNS` of a later measurement; none of the run's own."""
    if results.first is None:
        return []
    losses, differences = results.first.losses, results.minus_first()
    return [
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


def rich_first_table(results: Results) -> "Table":
    """The same for a terminal of 80 columns or more."""
    rows = [
        tuple(cell.replace(" ± ", "±") if column else cell for column, cell in enumerate(row))
        for row in first_table(results)
    ]
    caption = "now − run below zero: better than in the run."
    title = precisions(results).replace(", ", ",\n")  # both lines fit above the narrowest table
    return _rich(title, caption, _NARROW_FIRST_COLUMNS, rows)


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
    shown = {x.num_streams for x in results.models if x.speed.train_tokens_per_second is not None}
    return " ".join(
        f"The train tokens/s of P = {', '.join(map(str, training.p_values))} is that of the one "
        "training they share."
        for training in results.training
        if len(training.p_values) > 1 and shown.issuperset(training.p_values)
    )


def format_difference(difference: Difference | None) -> str:
    """`−0.1340 ± 0.0100`, or nothing."""
    if difference is None:
        return ""
    mean = f"{difference.mean:+.4f}".replace("-", "−")
    return f"{mean} ± {difference.standard_error:.4f}"


def _rates(model: ModelResult) -> tuple[float | None, ...]:
    """Training, prefill and decoding; nothing where none of them was measured."""
    speed = model.speed
    rates = (
        speed.train_tokens_per_second,
        speed.prefill_tokens_per_second,
        speed.decode_tokens_per_second,
    )
    return rates if any(rate is not None for rate in rates) else ()


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
