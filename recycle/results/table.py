"""Results -> the table, as text and for the terminal."""

from typing import TYPE_CHECKING

from .comparison import Difference, ModelResult
from .schema import Results

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
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    notes = ["Loss in nats per token; lower is better.", shared_training(results)]
    shown = Table(
        title=Text(results.name),
        caption=Text("\n".join(filter(None, notes))),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for number, column in enumerate(_NARROW_COLUMNS):
        shown.add_column(column, justify="right" if number else "left")
    for model in results.models:
        cells = (
            model.name,
            f"{model.loss:.4f}",
            format_difference(model.minus_backbone).replace(" ", ""),
            format_difference(model.minus_control).replace(" ", ""),
            _short_count(model.adapter_parameters),
            f"{model.kv_bytes_per_token:,}",
            "/".join(map(_short_rate, _rates(model))),
        )
        shown.add_row(*map(Text, cells))
    return shown


def shared_training(results: Results) -> str:
    """Whose training speed stands in the rows of a nested family; nothing for others."""
    return " ".join(
        f"The train tokens/s of P = {', '.join(map(str, training.streams))} is that of the one "
        "training they share."
        for training in results.training
        if len(training.streams) > 1 and training.tokens_per_second is not None
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
