"""What all figures have in common: colours, axes that show plain numbers, and PNG or inline SVG."""

import io
import re
from typing import TYPE_CHECKING

from recycle.results import ADAPTED, BACKBONE, CONTROL, LORA, WEIGHTS, Results

from .markdown import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, ORANGE, GREEN, PURPLE = "#555555", "#D55E00", "#009E73", "#AA4499"
COLORS = {BACKBONE: GREY, CONTROL: ORANGE, ADAPTED: GREEN, LORA: PURPLE, WEIGHTS: PURPLE}
BLUES = ("#56B4E9", "#0072B2", "#003F7F", "#001F3F")  # from the first P on
# In a page, colours are the style sheet's, which has others on a dark ground.
PAGE_COLORS = {
    "#000000": "currentColor",
    "#b0b0b0": "var(--line)",  # of the grid
    GREY: "var(--grey)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    **{blue: f"var(--blue{number})" for number, blue in enumerate(BLUES, start=1)},
}


def blue(place: int) -> str:
    """The colour of the P at a place in rising order, from 0."""
    return BLUES[min(place, len(BLUES) - 1)]


def axes_of(results: Results, x: str, y: str) -> "tuple[Figure, Axes]":
    """A figure of one plot, entitled with the run's name; ticks are the numbers themselves."""
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


def show_p(axes: "Axes", p_values: list[int]) -> None:
    """Let the axis of x be P, in powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(p_values) / 1.4, max(p_values) * 1.4)
    axes.set_xticks(p_values, labels=[str(p) for p in p_values])
    axes.minorticks_off()


def png(figure: "Figure") -> bytes:
    """An image file; equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: "Figure", prefix: str) -> str:
    """An `<svg>` for a page, without a title; its text can be read at a width of 400 pixels too.

    Args:
        figure: Not to be used again.
        prefix: What its ids begin with, its own in the page.
    """
    from matplotlib import rc_context

    figure.set_size_inches(4.9, 4.4 if figure.legends else 3.6)  # those below the plot
    for axes in figure.axes:
        axes.set_title("")
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recycle"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', drawn)
    assert view is not None
    body = drawn[drawn.index(">", view.end()) + 1 :]
    body = re.sub(r' id="(?:[a-z]+_?[a-z0-9]*_\d+)"', "", body)  # of groups: nothing refers to them
    body = re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}-", body.replace("xlink:", ""))
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for color, value in PAGE_COLORS.items():
        body = body.replace(color.lower(), value)
    return f'<svg {view[0]} aria-hidden="true">{body.strip()}'
