"""The report: the result, and how it was made; and all files of it, in the run folder."""

import json
from pathlib import Path

from recycle.disk import write_atomically
from recycle.results import Results

from .card import render_card
from .markdown import escape, facts, fence, format_table, join_blocks, one_line
from .plots import plot_loss_vs_streams, plot_loss_vs_tokens
from .publication import hide_folders
from .result import render_result
from .streams import render_streams


def write_report(results: Results, folder: Path) -> None:
    """Write report.md, README.md (the model card), loss_vs_tokens.png and loss_vs_streams.png.

    Everything is made before anything is written, and each file is replaced as a whole.
    Needs matplotlib (extra `train`).
    """
    contents = {
        "loss_vs_tokens.png": plot_loss_vs_tokens(results),
        "loss_vs_streams.png": plot_loss_vs_streams(results),
        "report.md": render_report(results).encode(),
        "README.md": render_card(results).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def render_report(results: Results) -> str:
    """The report in Markdown, meant to be published."""
    results = hide_folders(results)
    data, first, wall = results.data, results.adapt_data, results.wall_seconds
    trainings = {
        "training": [x.name for x in results.training],
        "P": [", ".join(map(str, x.p_values)) for x in results.training],
        "text tokens": [f"{x.tokens:,}" for x in results.training],
        "predicted": [_count(x.learned_tokens) for x in results.training],
        "steps": [f"{x.steps:,}" for x in results.training],
        "seconds": [f"{x.wall_seconds:,.0f}" for x in results.training],
        "text tokens/s": [_rate(x.tokens_per_second) for x in results.training],
        "stream tokens/s": [_rate(x.stream_tokens_per_second) for x in results.training],
        "kept at step": [_count(x.kept_step) for x in results.training],
    }
    return join_blocks(
        f"# Report: {escape(results.name)}",
        f"{results.date:%Y-%m-%d %H:%M} UTC, made by:",
        fence(one_line(results.command), "bash"),
        render_result(results),
        render_streams(results),
        "## Training",
        format_table([tuple(trainings), *zip(*trainings.values(), strict=True)]),
        f"Time: setup {wall.setup:,.0f} s, training {wall.training:,.0f} s, "
        f"evaluation {wall.evaluation:,.0f} s.",
        ""
        if wall.announced is None
        else f"Announced for training and evaluation: {wall.announced:,.0f} s; they took "
        f"{wall.training + wall.evaluation:,.0f} s.",
        state_kept_steps(results),
        "![Validation loss against text tokens](loss_vs_tokens.png)",
        "## Backbone",
        facts(results.backbone.model_dump()),
        "## Data",
        facts(data.model_dump(exclude={"facts"}) | data.facts),
        "" if first is None or first == data else "The first stage's:",
        ""
        if first is None or first == data
        else facts(first.model_dump(exclude={"facts"}) | first.facts),
        "## Made with",
        facts(results.hardware.model_dump() | results.packages),
        "Seeds: " + ", ".join(f"{escape(k)} {v}" for k, v in results.seeds.items()) + ".",
        f"Recipe, identity `{results.recipe_identity}`:",
        fence(json.dumps(results.recipe, indent=2, ensure_ascii=False), "json"),
    )


def state_kept_steps(results: Results) -> str:
    """Which trainings were best before their end, in Markdown."""
    early = [
        f"{escape(x.name)} at step {x.kept_step:,} of {x.steps:,}"
        for x in results.training
        if x.kept_step is not None and x.kept_step < x.steps
    ]
    if not early:
        return ""
    return (
        f"The validation loss was lowest before the end: {', '.join(early)}. What had been learned "
        "there, and at step 0 the start, is what was kept and measured."
    )


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
