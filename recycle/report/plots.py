"""The two plots, as PNG: validation loss against training tokens, and what each P brings."""

import io
import math
from typing import TYPE_CHECKING

from recycle.results import (
    ADAPTED,
    BACKBONE,
    CONTROL,
    LORA,
    WEIGHTS,
    Results,
    paired_difference,
    rows_of_training,
)

from .markdown import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, ORANGE, GREEN = "#555555", "#D55E00", "#009E73"
COLORS = {CONTROL: ORANGE, ADAPTED: GREEN, LORA: GREY, WEIGHTS: GREY}
BLUES = ("#56B4E9", "#0072B2", "#003F7F", "#001F3F")  # from the first P on


def plot_loss_vs_tokens(results: Results) -> bytes:
    """Validation loss of every trained model against the text tokens it learned from, as PNG."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = _axes(results, "text tokens learned from", "validation loss (nats per token)")
    curves: dict[str, list[tuple[int, float]]] = {}
    adapted = sum(x.tokens for x in results.training if ADAPTED in rows_of_training(x))
    for training in results.training:
        alone = {ADAPTED, LORA, WEIGHTS}.intersection(rows_of_training(training))
        before = 0 if alone else adapted  # streams go on where the first stage ended
        for point in training.curve:
            for name, loss in point.validation_loss.items():
                if math.isfinite(loss):
                    curves.setdefault(name, []).append((before + point.tokens, loss))
    blues = iter(BLUES)
    for name, points in curves.items():
        color = COLORS.get(name) or next(blues, BLUES[-1])
        line = "o--" if name in COLORS else "o-"
        axes.plot(*zip(*points, strict=True), line, color=color, markersize=4, label=name)
    axes.set_xlim(right=max(1, axes.get_xlim()[1]))  # of a run of no tokens as well
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if curves:
        axes.legend(frameon=False)
    else:
        axes.text(
            0.5, 0.5, "no validation loss was measured", ha="center", transform=axes.transAxes
        )
    return _png(figure)


def plot_loss_vs_streams(results: Results) -> bytes:
    """Held-out loss of each P minus the control's, or else the backbone's, as PNG.

    The error bars are the standard errors of these very differences, paired over documents: a bar
    that ends far from zero tells a P from the control.
    """
    other = CONTROL if any(model.name == CONTROL for model in results.models) else BACKBONE
    models = [model for model in results.models if model.num_streams > 1]
    p_values = [model.num_streams for model in models]
    differences = [x for model in models if (x := model.minus_control or model.minus_backbone)]
    figure, axes = _axes(
        results,
        "P (parallel streams)",
        f"held-out loss minus the {other}'s\n(nats per token; below zero is better)",
    )
    axes.axhline(0, color=ORANGE if other == CONTROL else GREY, linestyle="--", label=other)
    zero = next(model for model in results.models if model.name == other)
    for model in results.models:
        if model.name in (ADAPTED, LORA, WEIGHTS):
            level = paired_difference(model.losses, zero.losses, results.tokens).mean
            axes.axhline(level, color=COLORS[model.name], linestyle=":", label=model.name)
    axes.errorbar(
        p_values,
        [x.mean for x in differences],  # one that is not finite leaves a gap
        yerr=[x.standard_error or 0.0 for x in differences],
        color=BLUES[1],
        marker="o",
        capsize=4,
        label=f"P streams minus {other},\n± one standard error",
    )
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(p_values) / 1.4, max(p_values) * 1.4)
    axes.set_xticks(p_values, labels=[str(p) for p in p_values])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return _png(figure)


def _axes(results: Results, x: str, y: str) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=(7, 4.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(one_line(results.name), parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    plain = ScalarFormatter(useOffset=False)  # the numbers themselves, not "1e-5 + 2.48"
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
