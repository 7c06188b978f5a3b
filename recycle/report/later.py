"""What else was measured of the rows: tasks and other data, and how each goes on with a prompt."""

from recycle.results import (
    BACKBONE,
    CONTROL,
    LORA,
    WEIGHTS,
    Results,
    TaskResult,
    format_difference,
    perplexity,
)

from .markdown import escape, facts, fence, format_table, join_blocks


def render_tasks(results: Results) -> str:
    """The section on tasks, in Markdown; nothing where none was measured."""
    order = {row.name: row.num_streams for row in results.models}
    parts = [part for task in results.tasks for part in _render_task(task, order)]
    return join_blocks("## Tasks", *parts).rstrip() if parts else ""


def _render_task(task: TaskResult, order: dict[str, int]) -> tuple[str, ...]:
    """One task: each row beside the backbone, the control, weights alone and the next smaller P."""
    rows = [*(x for x in order if x in task.scores), *(x for x in task.scores if x not in order)]
    streams = sorted((x for x in rows if order.get(x, 1) > 1), key=order.__getitem__)
    smaller = dict(zip(streams[1:], streams, strict=False))
    others = [name for name in (BACKBONE, CONTROL, LORA, WEIGHTS) if name in rows]
    headings = ["row", task.metric, *(f"− {other} ± se" for other in others)]
    if any(perplexity(task, name) for name in rows):
        headings.insert(2, "perplexity")
    table = [[*headings, "− next smaller P ± se"] if smaller else headings]
    for name in rows:
        against = [other if other != name else None for other in others]
        against += [smaller.get(name)] if smaller else []
        cells = ["" if x is None else format_difference(task.difference(name, x)) for x in against]
        value = [f"{task.mean(name):.4f}", perplexity(task, name)]
        table.append([name, *filter(None, value), *cells])
    count = len(task.weights)
    return (
        f"### {escape(task.name)}",
        f"{escape(task.metric)} over {count} documents; "
        f"{'higher' if task.higher_is_better else 'lower'} is better. Differences are paired over "
        f"documents. Measured {task.date:%Y-%m-%d} by:",
        fence(task.command, "bash"),
        format_table(table),
        facts(task.settings),
    )


def render_samples(results: Results) -> str:
    """The section on samples, in Markdown; nothing where there are none."""
    parts = []
    for sample in results.samples:
        parts += ["Prompt:", fence(sample.prompt, "text")]
        for name, reply in sample.replies.items():
            parts += [f"**{escape(name)}** goes on:", fence(reply, "text")]
    note = "Greedy decoding: what a row finds likeliest. A few samples show a kind, not a quality."
    return join_blocks("## Samples", note, *parts).rstrip() if parts else ""
