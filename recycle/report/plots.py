"""The two plots, as PNG: loss against training tokens, and loss against P."""

import io
from typing import TYPE_CHECKING

from recycle.results import BACKBONE, CONTROL, ModelResult, Results

from .markdown import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {BACKBONE: "#555555", CONTROL: "#D55E00"}
BLUES = ("#56B4E9", "#0072B2", "#003F7F", "#001F3F")  # from the first P on


def plot_loss_vs_tokens(results: Results) -> bytes:
    """Validation loss of every trained model against the text tokens it learned from, as PNG."""
    figure, axes = _axes(results, "text tokens learned from", "validation loss (nats per token)")
    curves: dict[str, list[tuple[int, float]]] = {}
    for training in results.training:
        for point in training.curve:
            for name, loss in point.validation_loss.items():
                curves.setdefault(name, []).append((point.tokens, loss))
    blues = iter(BLUES)
    for name, points in curves.items():
        axes.plot(
            *zip(*points, strict=True),
            color=LINES.get(name) or next(blues, BLUES[-1]),
            linestyle="--" if name in LINES else "-",
            marker="o",
            markersize=4,
            label=name,
        )
    if curves:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(frameon=False)
    else:
        axes.text(
            0.5, 0.5, "no validation loss was measured", ha="center", transform=axes.transAxes
        )
    return _png(figure)


def plot_loss_vs_streams(results: Results) -> bytes:
    """Held-out loss against P, with the backbone and the control as lines, as PNG."""
    figure, axes = _axes(results, "P (parallel streams)", "held-out loss (nats per token)")
    for model in results.models:
        if model.name in LINES:
            colour, error = LINES[model.name], _error(model)
            axes.axhline(model.loss, color=colour, linestyle="--", label=model.name)
            axes.axhspan(model.loss - error, model.loss + error, color=colour, alpha=0.15, lw=0)
    families = [model for model in results.models if model.num_streams > 1]
    streams = [model.num_streams for model in families]
    axes.errorbar(
        streams,
        [model.loss for model in families],
        yerr=[_error(model) for model in families],
        color=BLUES[1],
        marker="o",
        capsize=4,
        label="P parallel streams",
    )
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(streams) / 1.4, max(streams) * 1.4)
    axes.set_xticks(streams, labels=[str(p) for p in streams])
    axes.legend(
        frameon=False,
        title="± one standard error of the\npaired difference to the backbone",
        title_fontsize="small",
    )
    return _png(figure)


def _error(model: ModelResult) -> float:
    return 0.0 if model.minus_backbone is None else model.minus_backbone.standard_error


def _axes(results: Results, x: str, y: str) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(one_line(results.name), parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
