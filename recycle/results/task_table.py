"""The table of what `recycle eval` measured on tasks and on other data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .comparison import ADAPTED, BACKBONE, CONTROL
from .table import Columns, format_difference, rich_columns
from .tasks import TaskResult

if TYPE_CHECKING:
    from rich.table import Table

LOSS = "loss"  # the metric whose exponential is a perplexity


def rich_tasks(tasks: Sequence[TaskResult]) -> "Table":
    """The table for a terminal of 80 columns or more."""
    notes = "− reference ± se: to the control where there is one, paired over documents."
    if any(x.metric == LOSS for x in tasks):
        notes += "\nLoss in nats per token; lower is better."
    return rich_columns("Tasks and other data", notes, _columns(tasks))


def reference(task: TaskResult) -> str | None:
    """The row that others are compared with: the control, else P = 1, else the backbone."""
    return next((x for x in (CONTROL, ADAPTED, BACKBONE) if x in task.scores), None)


def _columns(tasks: Sequence[TaskResult]) -> Columns:
    rows = [(task, name) for task in tasks for name in task.scores]
    columns = {
        "model": [name for _, name in rows],
        "task": [task.name for task, _ in rows],
        "metric": [task.metric for task, _ in rows],
        "value": [f"{task.mean(name):.4f}" for task, name in rows],
        "perplexity": [perplexity(task, name) for task, name in rows],
        "− reference\n± se": [_difference(task, name) for task, name in rows],
        "documents": [str(len(task.weights)) for task, _ in rows],
    }
    if not any(columns["perplexity"]):
        del columns["perplexity"]
    return columns


def perplexity(task: TaskResult, name: str) -> str:
    """The exponential of a row's loss; nothing of another metric."""
    return f"{math.exp(min(task.mean(name), 700)):,.2f}" if task.metric == LOSS else ""


def _difference(task: TaskResult, name: str) -> str:
    other = reference(task)
    return "" if other in (None, name) else format_difference(task.difference(name, str(other)))
