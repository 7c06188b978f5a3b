"""The report in Markdown, and all files of it in the run folder."""

import json
from pathlib import Path

from recycle.disk import write_atomically
from recycle.results import Results

from .card import render_card
from .deployment import render_deployment, render_estimates
from .drawing import png
from .later import render_samples, render_tasks
from .markdown import escape, facts, fence, format_table, join_blocks, one_line
from .plots import plots_of
from .publication import hide_folders
from .result import render_result
from .scaling import render_scaling
from .streams import render_streams

TRACES = """\
Every number here is in `results.json` or follows from it: losses and differences from \
`models.losses`, each document with its `documents.tokens`; memory from `backbone.parameters`, \
`models.adapter_parameters` and `models.kv_bytes_per_token`; time from `models.speed`, or else \
from `estimates`; streams from `models.streams`; curves from `training.curve`; tasks from \
`tasks.scores`."""


def write_report(results: Results, folder: Path) -> None:
    """Write report.html, report.md, README.md (the model card) and the plots.

    Everything is made before anything is written, and each file is replaced as a whole.
    Needs matplotlib, jinja2 and markdown-it-py (extra `train`).
    """
    from .page import render_page

    contents = {name: png(plot(results)) for name, plot in plots_of(results).items()}
    contents |= {
        "report.md": render_report(results).encode(),
        "report.html": render_page([results]).encode(),
        "README.md": render_card(results).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def render_report(results: Results) -> str:
    """The report in Markdown, meant to be published."""
    results = hide_folders(results)
    return join_blocks(
        render_opening(results).rstrip(), render_samples(results), render_making(results).rstrip()
    )


def render_opening(results: Results) -> str:
    """What was found, in Markdown; of results that may be published."""
    return join_blocks(
        f"# Report: {escape(results.name)}",
        f"{results.date:%Y-%m-%d %H:%M} UTC, made by:",
        fence(one_line(results.command), "bash"),
        render_result(results),
        render_deployment(results),
        render_tasks(results),
        render_scaling(results),
        render_streams(results),
    )


def render_making(results: Results) -> str:
    """How it was made, in Markdown; of results that may be published."""
    data, first = results.data, results.adapt_data
    wall, memory = results.wall_seconds, results.memory_gib
    trainings = {
        "training": [x.name for x in results.training],
        "P": [", ".join(map(str, x.p_values)) for x in results.training],
        "text tokens": [f"{x.tokens:,}" for x in results.training],
        "predicted": [_count(x.learned_tokens) for x in results.training],
        "steps": [f"{x.steps:,}" for x in results.training],
        "processes": [str(x.processes) for x in results.training],
        "seconds": [f"{x.wall_seconds:,.0f}" for x in results.training],
        "text tokens/s": [_rate(x.tokens_per_second) for x in results.training],
        "stream tokens/s": [_rate(x.stream_tokens_per_second) for x in results.training],
        "kept at step": [_count(x.kept_step) for x in results.training],
    }
    return join_blocks(
        "## Training",
        format_table([tuple(trainings), *zip(*trainings.values(), strict=True)]),
        f"Time: setup {wall.setup:,.0f} s, training {wall.training:,.0f} s, "
        f"evaluation {wall.evaluation:,.0f} s.",
        ""
        if wall.announced is None
        else f"Announced for training and evaluation: {wall.announced:,.0f} s; they took "
        f"{wall.training + wall.evaluation:,.0f} s.",
        ""
        if memory is None
        else f"Peak memory announced: {memory.announced:.2f} GiB; it took {memory.taken:.2f} GiB.",
        state_kept_steps(results),
        "![Validation loss against text tokens](loss_vs_tokens.png)",
        render_estimates(results),
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
        TRACES,
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
