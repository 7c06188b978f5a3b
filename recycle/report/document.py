"""The report: the result, and everything that is known of how it came about."""

import json

from recycle.results import Results

from .markdown import document, escape, facts, fence, one_line, table
from .result import result

TRAINING_COLUMNS = (
    "training",
    "P",
    "text tokens",
    "steps",
    "seconds",
    "text tokens/s",
    "stream tokens/s",
)


def report(results: Results) -> str:
    """The report in Markdown."""
    data, wall = results.data, results.wall_seconds
    trainings = [
        (
            training.name,
            ", ".join(map(str, training.p_values)),
            f"{training.tokens:,}",
            f"{training.steps:,}",
            f"{training.wall_seconds:,.0f}",
            _rate(training.tokens_per_second),
            _rate(training.stream_tokens_per_second),
        )
        for training in results.training
    ]
    return document(
        f"# Report: {escape(results.name)}",
        f"{results.date:%Y-%m-%d %H:%M} UTC, made by:",
        fence(one_line(results.command), "bash"),
        result(results),
        "## Training",
        table(TRAINING_COLUMNS, trainings),
        f"Wall time: setup {wall.setup:,.0f} s, training {wall.training:,.0f} s, "
        f"evaluation {wall.evaluation:,.0f} s.",
        "![Validation loss against text tokens](loss_vs_tokens.png)",
        "## Backbone",
        facts(results.backbone.model_dump()),
        "## Data",
        facts(data.model_dump(exclude={"facts"}) | data.facts),
        "## Made with",
        facts(results.hardware.model_dump() | results.packages),
        "Seeds: " + ", ".join(f"{escape(k)} {v}" for k, v in results.seeds.items()) + ".",
        f"Recipe, identity `{results.recipe_identity}`:",
        fence(json.dumps(results.recipe, indent=2, ensure_ascii=False), "json"),
    )


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
