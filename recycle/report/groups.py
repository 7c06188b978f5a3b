"""Several runs: the seeds of one recipe as mean and spread, and recipes beside each other."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from recycle.recipe.consequences import FREE, OUTSIDE_IDENTITY
from recycle.results import (
    ModelResult,
    Results,
    format_difference,
    paired_difference,
    precision,
)

from .markdown import format_table, join_blocks
from .publication import hide_folders

ALIKE = re.compile(r"name|training\.seed|(.*\.)?data\.seed")
"""What runs of one recipe may differ in, beside all that is outside a recipe's identity."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe."""

    label: str
    """A, B, ..."""
    settings: dict[str, Any]
    """The recipe by dotted key, without what is free; and the precision it was measured in."""
    runs: tuple[Results, ...]

    @property
    def rows(self) -> list[str]:
        """Rows that all runs have, in the order of the table."""
        return [x.name for x in self.runs[0].models if all(_has(run, x.name) for run in self.runs)]

    def all_of(self, row: str) -> list[ModelResult]:
        """One row of every run."""
        return [next(x for x in run.models if x.name == row) for run in self.runs]

    def losses(self, row: str) -> list[float]:
        """Loss of each document, the mean of the runs; they must have the same documents."""
        return [
            statistics.fmean(x) for x in zip(*(y.losses for y in self.all_of(row)), strict=True)
        ]


def gather(runs: Sequence[Results]) -> list[Group]:
    """The runs by recipe, in the order in which they are given."""
    found: dict[str, list[Results]] = {}
    for run in runs:
        found.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    labels = [*ascii_uppercase, *(f"R{number}" for number in range(27, len(found) + 1))]
    return [
        Group(label, json.loads(key), tuple(group))
        for label, (key, group) in zip(labels, found.items(), strict=False)
    ]


def render_groups(runs: Sequence[Results]) -> str:
    """The runs beside each other, in Markdown meant to be published."""
    groups = gather(runs)
    lines = [
        (
            f"{x.label}: {run.name}",
            f"{run.date:%Y-%m-%d %H:%M}",
            state_seeds(run),
            str(len(run.documents)),
        )
        for x in groups
        for run in x.runs
    ]
    same = all(run.documents == runs[0].documents for run in runs)
    return join_blocks(
        "## The runs",
        format_table([("run", "date (UTC)", "seeds", "test documents"), *lines]),
        _render_settings(groups),
        "## Side by side",
        format_table(_compare(groups, same)),
        "Held-out loss in nats per token; lower is better."
        if _alone(groups)
        else "Held-out loss in nats per token, and the difference to the run's own control: the "
        "mean of the runs, and as its spread their standard deviation. ± is something else, one "
        "standard error over test documents.",
        f"Differences to {groups[0].label} are paired over documents, the losses of several runs "
        "averaged first."
        if same and len(groups) > 1
        else "",
        ""
        if same
        else "The runs have different test documents, so their losses cannot be compared from run "
        "to run, and no difference between recipes is given. Differences to the control can: each "
        "is of one run's own documents.",
    ).rstrip()


def _alone(groups: Sequence[Group]) -> bool:
    """Whether there are no seeds, so that no run has a spread."""
    return all(len(group.runs) == 1 for group in groups)


def _compare(groups: Sequence[Group], same: bool) -> list[tuple[str, ...]]:
    """The table of all rows of all groups."""
    first, beside = groups[0], same and len(groups) > 1
    spreads = ["runs", "held-out loss", "spread", "− control", "spread"]
    headings = ["row", *(["held-out loss", "− control ± se"] if _alone(groups) else spreads)]
    table = [(*headings, f"− {first.label} ± se") if beside else tuple(headings)]
    for group in groups:
        for row in group.rows:
            models = group.all_of(row)
            control = [x.minus_control.mean for x in models if x.minus_control is not None]
            spread = [str(len(models)), *_spread([x.loss for x in models], ".4f")]
            spread += _spread(control, "+.4f")
            cells = [f"{models[0].loss:.4f}", format_difference(models[0].minus_control)]
            cells = [f"{group.label}: {row}", *(cells if _alone(groups) else spread)]
            if beside and group is not first and row in first.rows:
                losses = group.losses(row), first.losses(row)
                cells.append(format_difference(paired_difference(*losses, group.runs[0].tokens)))
            elif beside:
                cells.append("")
            table.append(tuple(cells))
    return table


def _spread(values: list[float], form: str) -> tuple[str, str]:
    """Mean and standard deviation, as far as there are any."""
    if not values:
        return "", ""
    mean = f"{sum(values) / len(values):{form}}".replace("-", "−")
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return mean, f"{statistics.stdev(values):.4f}" if finite else "–"


def _render_settings(groups: Sequence[Group]) -> str:
    """What the recipes differ in, in Markdown."""
    if len(groups) == 1:
        return "All are of one recipe."
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    rows = []
    for key in keys:
        if any(x.settings.get(key) != groups[0].settings.get(key) for x in groups):
            shown = [_settings(hide_folders(x.runs[0])) for x in groups]
            rows.append((key, *(_as_json(x[key]) if key in x else "" for x in shown)))
    return join_blocks(
        "The recipes differ in:", format_table([("field", *(x.label for x in groups)), *rows])
    ).rstrip()


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _settings(run: Results) -> dict[str, Any]:
    flat = dict(_flatten(run.recipe))
    kept = {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in OUTSIDE_IDENTITY
        and key not in FREE
        and not ALIKE.fullmatch(key)
    }
    return kept | {
        "backbone fingerprint": run.backbone.fingerprint,
        "measured in": precision(run.backbone),
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            items += _flatten(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", value))
    return items


def state_seeds(run: Results) -> str:
    """`data 0, training 1`."""
    return ", ".join(f"{name} {seed}" for name, seed in run.seeds.items())


def _has(run: Results, row: str) -> bool:
    return any(x.name == row for x in run.models)
