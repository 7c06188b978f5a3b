"""The run's own figures: losses against tokens, P, memory and latency, and the streams' weights."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from recycle.results import (
    ADAPTED,
    BACKBONE,
    CONTROL,
    LORA,
    WEIGHTS,
    ModelResult,
    Results,
    paired_difference,
    rows_of_training,
)

from .deployment import memory_gib, recommend, seconds_per_token
from .drawing import BLUES, COLORS, GREY, ORANGE, axes_of, blue, show_p
from .scaling import fit, plot_fitted_law, plot_paper_law
from .streams import HARDLY_USED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots_of(results: Results) -> "dict[str, Callable[[Results], Figure]]":
    """File name -> the function that draws it, of all figures that the record has numbers for."""
    known = {
        "fitted_law.png": (plot_fitted_law, not isinstance(fit(results), str)),
        "paper_law.png": (plot_paper_law, True),
        "loss_vs_tokens.png": (plot_loss_vs_tokens, True),
        "loss_vs_streams.png": (plot_loss_vs_streams, True),
        "loss_vs_memory.png": (plot_loss_vs_memory, memory_gib(results)),
        "loss_vs_latency.png": (plot_loss_vs_latency, seconds_per_token(results)),
        "stream_weights.png": (plot_stream_weights, any(x.streams for x in results.models)),
    }
    return {name: plot for name, (plot, known) in known.items() if known}


def plot_loss_vs_tokens(results: Results) -> "Figure":
    """Validation loss of every trained model against the text tokens it learned from."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = axes_of(results, "text tokens learned from", "validation loss (nats per token)")
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
    return figure


def plot_loss_vs_streams(results: Results) -> "Figure":
    """Held-out loss of each P minus the control's, or else the backbone's.

    The error bars are the standard errors of these very differences, paired over documents: a bar
    that ends far from zero tells a P from the control.
    """
    other = CONTROL if any(model.name == CONTROL for model in results.models) else BACKBONE
    models = [model for model in results.models if model.num_streams > 1]
    p_values = [model.num_streams for model in models]
    differences = [x for model in models if (x := model.minus_control or model.minus_backbone)]
    figure, axes = axes_of(
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
    show_p(axes, p_values)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # its lines cross the plot
    return figure


def plot_loss_vs_memory(results: Results) -> "Figure":
    """Held-out loss of every row against the memory that it takes."""
    return _plot_against(results, memory_gib(results), "memory (GiB)")


def plot_loss_vs_latency(results: Results) -> "Figure":
    """Held-out loss of every row against the time it takes to decode a token."""
    seconds = seconds_per_token(results)
    thousandths = {name: 1000 * value for name, value in seconds.items()}
    return _plot_against(results, thousandths, "time to decode a token (ms)")


def _plot_against(results: Results, prices: dict[str, float], x: str) -> "Figure":
    """The rows that have a price: those at P = 1 as points of their own, those of P in a line."""
    figure, axes = axes_of(results, x, "held-out loss (nats per token)")
    rows = [y for y in results.models if y.name in prices and math.isfinite(y.loss)]
    streams = sorted((y for y in rows if y.num_streams > 1), key=lambda y: y.num_streams)
    markers = {BACKBONE: "s", ADAPTED: "^", LORA: "v", WEIGHTS: "v", CONTROL: "D"}

    def place(row: ModelResult) -> tuple[float, float]:
        return prices[row.name], row.loss

    if streams:
        axes.plot(*zip(*map(place, streams), strict=True), color=BLUES[0], linewidth=1)
    for row in rows:
        marker = markers.get(row.name, "o")
        color = blue(streams.index(row)) if row in streams else COLORS[row.name]
        axes.plot(*place(row), marker, color=color, label=row.name)
    chosen, _ = recommend(results)
    if chosen in rows:
        axes.plot(
            *place(chosen), "o", color=ORANGE, markersize=15, fillstyle="none", label="recommended"
        )
    axes.margins(0.12)
    if rows:
        axes.legend(frameon=False)
    return figure


def plot_stream_weights(results: Results) -> "Figure":
    """What each stream of each P weighs, as a multiple of an equal share."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = axes_of(results, "stream", "mean weight, times P\n(1 is an equal share)")
    rows = sorted((x for x in results.models if x.streams), key=lambda x: x.num_streams)
    for number, row in enumerate(rows):
        weights = [weight * row.num_streams for weight in row.streams.weights]  # type: ignore[union-attr]
        axes.plot(range(1, len(weights) + 1), weights, "o-", color=blue(number), label=row.name)
    axes.axhline(HARDLY_USED, color=ORANGE, linestyle=":", label="hardly used below")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(frameon=False)
    return figure
