"""The tables of a result, as text and for the terminal."""

import math
from typing import TYPE_CHECKING

from .comparison import BACKBONE, LORA, WEIGHTS, Difference, paired_difference, token_mean
from .schema import Results, precision

if TYPE_CHECKING:
    from rich.table import Table

TERMINAL = 80  # characters, in which a table has room

Columns = dict[str, list[str]]
"""Heading, with line breaks for the terminal -> its cells, one for each model."""


def tabulate(results: Results) -> list[tuple[str, ...]]:
    """The table as text: the headings, then one row for each model.

    The column of speeds is there where prefill or decoding was measured.
    """
    return _rows(_columns(results, short=False))


def rich_table(results: Results) -> "Table":
    """The table for a terminal of 80 columns or more, with parameters and speeds rounded."""
    notes = ["Loss in nats per token; lower is better.", shared_training(results)]
    return rich_columns(results.name, "\n".join(filter(None, notes)), _columns(results, short=True))


def tabulate_again(results: Results) -> list[tuple[str, ...]]:
    """A later measurement beside the run's own: headings and rows; nothing for the run's own."""
    return _rows(_columns_again(results)) if results.first is not None else []


def rich_first_table(results: Results) -> "Table":
    """The same for a terminal of 80 columns or more."""
    title = precisions(results).replace(", ", ",\n")  # both lines fit above the narrowest table
    caption = "now − run below zero: better than in the run."
    return rich_columns(title, caption, _columns_again(results))


def precisions(results: Results) -> str:
    """In which precisions of the backbone the adapters were trained and are measured."""
    trained_on = results.first or results.backbone
    return f"Trained on {precision(trained_on)}, measured on {precision(results.backbone)}"


def _columns(results: Results, short: bool) -> Columns:
    models = results.models
    count = _short_count if short else "{:,}".format
    rate = _short_rate if short else "{:,.1f}".format
    slash = "/" if short else " / "
    columns = {
        "model": [x.name for x in models],
        "held-out\nloss": [f"{x.loss:.4f}" for x in models],
        "− backbone\n± se": [format_difference(x.minus_backbone) for x in models],
        "− control\n± se": [format_difference(x.minus_control) for x in models],
    }
    if alone := next((x.name for x in models if x.name in (LORA, WEIGHTS)), None):
        columns[f"− {alone}\n± se"] = [format_difference(x.minus_weights) for x in models]
    if any(x.right for x in models):
        columns["answers\nright"] = [f"{sum(x.right or ())}/{len(x.right or ())}" for x in models]
    columns |= {
        "adapter\nparams": [count(x.adapter_parameters) for x in models],
        "KV bytes\n/token": [f"{x.kv_bytes_per_token:,}" for x in models],
    }
    if not short and any(x.train_seconds is not None for x in models):
        columns["training\nseconds"] = [_effort(x.train_seconds, ",.0f") for x in models]
        columns["training\nFLOPs"] = [_effort(x.train_flops, ".2g") for x in models]
    if _has_speed(results):
        columns["train/prefill\n/decode\ntokens/s"] = [
            slash.join("–" if speed is None else rate(speed) for _, speed in model.speed)
            for model in models
        ]
    for heading in ("KV bytes\n/token", "adapter\nparams") if short else ():
        if _width(columns) > TERMINAL:
            del columns[heading]
    return columns


def _width(columns: Columns) -> int:
    """Characters of a row in a terminal."""
    cells = ([*heading.split("\n"), *column] for heading, column in columns.items())
    return sum(1 + max(len(x.replace(" ± ", "±")) for x in column) for column in cells) - 1


def _columns_again(results: Results) -> Columns:
    assert results.first is not None
    models, differences, losses = results.models, results.minus_first(), results.first.losses
    minus_backbone = [
        None
        if x.name == BACKBONE
        else paired_difference(losses[x.name], losses[BACKBONE], results.tokens)
        for x in models
    ]
    return {
        "model": [x.name for x in models],
        "run\nloss": [f"{token_mean(losses[x.name], results.tokens):.4f}" for x in models],
        "loss\nnow": [f"{x.loss:.4f}" for x in models],
        "now − run\n± se": [format_difference(differences[x.name]) for x in models],
        "run:\n− backbone ± se": [format_difference(x) for x in minus_backbone],
        "now:\n− backbone ± se": [format_difference(x.minus_backbone) for x in models],
    }


def _rows(columns: Columns) -> list[tuple[str, ...]]:
    headings = (heading.replace("\n/", "/").replace("\n", " ") for heading in columns)
    return [tuple(headings), *zip(*columns.values(), strict=True)]


def rich_columns(title: str, caption: str, columns: Columns) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=Text(title), caption=Text(caption), box=SIMPLE_HEAD, show_edge=False, padding=0
    )
    for heading in columns:
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for name, *cells in zip(*columns.values(), strict=True):
        shown.add_row(Text(name), *(Text(cell.replace(" ± ", "±")) for cell in cells))
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


def _has_speed(results: Results) -> bool:
    """Whether prefill or decoding was measured. Training alone stands with the trainings."""
    speeds = (model.speed for model in results.models)
    measured = ((x.prefill_tokens_per_second, x.decode_tokens_per_second) for x in speeds)
    return any(pair != (None, None) for pair in measured)


def _effort(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _short_rate(rate: float) -> str:
    """`5.9`, `579`, `12k`."""
    return f"{rate / 1e3:.0f}k" if rate >= 1e4 else f"{rate:.{int(rate < 100)}f}"


def _short_count(count: int) -> str:
    """`48`, `553k`, `1.77M`."""
    if count >= 1e6:
        return f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}k" if count >= 1e3 else str(count)
