"""The streams of each P: how alike they err, how much each weighs, and what is odd about that."""

import math

from recycle.results import Results

from .markdown import bullets, escape, format_table, join_blocks

HARDLY_USED = 1 / 4
"""Of 1 / P, which is what every stream weighs where all weigh the same."""
DOMINANT = 0.9
COLLAPSED = 0.98
"""Error correlation. After short trainings on the CPU it was 0.92 to 0.96 (scripts/measured)."""


def render_streams(results: Results) -> str:
    """The section on the streams, in Markdown; nothing where they were not measured."""
    rows = [
        (
            model.name,
            "–" if use.error_correlation is None else f"{use.error_correlation:.4f}",
            f"{use.entropy:.4f} of {math.log(len(use.weights)):.4f}",
            ", ".join(f"{weight:.3f}" for weight in use.weights),
        )
        for model in results.models
        if (use := model.streams) is not None
    ]
    if not rows:
        return ""
    headings = ("model", "error correlation", "entropy of the weights", "weight of each stream")
    return join_blocks(
        "## Streams",
        format_table([headings, *rows]),
        bullets(
            [
                "Error correlation: of the losses that two streams, each alone, have on the same "
                "tokens; the mean over all pairs. Near 1 the streams make the same mistakes, and "
                "there is little that they can add to each other.",
                "Weights and entropy: of the weighted sum that merges the streams; means over the "
                "predicted tokens of the test documents. The entropy is in nats, beside ln P, "
                "which it is where every stream weighs the same.",
            ]
        ),
        "![What each stream weighs](stream_weights.png)",
    ).rstrip()


def warn_of_streams(results: Results) -> list[str]:
    """A line for each stream that hardly takes part or leaves no part to others, in Markdown.

    And one for each P whose streams have collapsed: they make the same mistakes.
    """
    lines = []
    for model in results.models:
        weights = model.streams.weights if model.streams is not None else ()
        for number, weight in enumerate(weights, start=1):
            least = HARDLY_USED / len(weights)
            if least <= weight <= DOMINANT:
                continue
            verb = "hardly uses" if weight < least else "is mostly"
            bound = f"below {least:.4f}" if weight < least else f"above {DOMINANT}"
            lines.append(
                f"**{escape(model.name)}** {verb} stream {number}: its mean weight is "
                f"{weight:.4f}, {bound}. Try a higher `stages.streams.aggregator_learning_rate`, "
                "more weight for this P in `stages.streams.loss_weights`, or fewer streams."
            )
        alike = model.streams.error_correlation if model.streams is not None else None
        if alike is not None and alike > COLLAPSED:
            lines.append(
                f"The streams of **{escape(model.name)}** have collapsed: their errors correlate "
                f"by {alike:.4f}, above {COLLAPSED}. Train on more tokens, try a higher "
                "`stages.streams.prefix_learning_rate`, or use fewer streams."
            )
    return lines
