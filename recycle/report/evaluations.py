"""Results as the Hub shows them beside a model: its model-index."""

import math

from huggingface_hub import EvalResult

from recycle.results import Results


def evaluation_results(results: Results) -> list[EvalResult]:
    """The held-out loss of each row of the table, and what it reached on each task.

    Values that are no finite number are left out: the Hub takes none.
    """
    data, on_hub = results.data, results.data.source == "hub"
    held_out = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.path if on_hub and data.path else data.source,
            dataset_name=f"held-out documents of {data.path or data.source}",
            dataset_split="test",
            metric_type="loss",
            metric_name=f"{row.name}: nats per token",
            metric_value=round(row.loss, 4),
        )
        for row in results.models
        if math.isfinite(row.loss)
    ]
    tasks = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.name,
            dataset_name=task.name,
            metric_type=task.metric,
            metric_name=f"{row}: {task.metric}",
            metric_value=round(task.mean(row), 4),
        )
        for task in results.tasks
        for row in task.scores
        if math.isfinite(task.mean(row))
    ]
    return held_out + tasks
