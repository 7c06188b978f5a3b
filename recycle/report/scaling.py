"""The scaling law: fitted to this run, and as the paper has it, with this model in its place."""

from typing import TYPE_CHECKING

from recycle.law import PAPER
from recycle.results import ADAPTED, BACKBONE, CONTROL, Results

from .drawing import BLUES, GREY, axes_of, show_p
from .markdown import escape, format_table, join_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recycle.law import RunLaw

CORPUS = "stack-v2-python"
"""The paper's law that is shown."""
PAPER_P = (1, 2, 4, 8, 16)


def fit(results: Results) -> "RunLaw | str":
    """The law fitted to a run's losses, or why there is none."""
    from recycle.law import fit_run

    return fit_run(results)


def scale_of(results: Results) -> int:
    """N: parameters outside the embeddings, or all of them in a record that did not count these."""
    backbone = results.backbone
    return backbone.non_embedding_parameters or backbone.parameters


def render_scaling(results: Results) -> str:
    """The section on both laws, in Markdown."""
    fitted, paper, scale = fit(results), PAPER[CORPUS], scale_of(results)
    one, measured = _losses(results)
    rows = []
    if not isinstance(fitted, str):
        for p in [*measured, 2 * max(measured)]:
            low, high = fitted.band(p)
            loss = f"{measured[p]:.4f}" if p in measured else "–"
            law = f"{fitted.loss(p):.4f}"
            rows.append((str(p), loss, law, f"{low:.4f} to {high:.4f}"))
    papers = [
        (
            str(p),
            f"{paper.equal_parameters(scale, p) / 1e6:,.0f}M",
            f"{paper.loss(scale, p) - paper.loss(scale, 1):+.4f}".replace("-", "−"),
        )
        for p in PAPER_P
    ]
    counted = results.backbone.non_embedding_parameters is not None
    return join_blocks(
        "## The scaling law",
        "`L = E + (A / (N (k ln P + 1)))^α`, loss L in nats per token, N parameters, P streams. It "
        "was found on models trained from scratch: on a model that is already trained it is an "
        "extrapolation.",
        escape(fitted)
        if isinstance(fitted, str)
        else f"Fitted to this run: k = {fitted.law.k:.4f} (the paper's: {paper.k}), "
        f"A = {fitted.law.A:.4g}. At 1 it takes the {one}. The band is over test documents; the "
        "last row is a forecast:",
        format_table([("P", "held-out loss", "the law", "its 95 % band"), *rows]) if rows else "",
        "![Held-out loss against P, and the fitted law](fitted_law.png)" if rows else "",
        f"As in the paper, on code (`{CORPUS}`), for a model of this size ({scale / 1e6:,.0f}M):",
        format_table([("P", "as good as parameters", "loss minus that of P = 1"), *papers]),
        ""
        if counted
        else "N counts the embeddings too: the record is from before those were counted apart.",
        "![The paper's law: lines of equal loss, given above them; and this model](paper_law.png)",
    ).rstrip()


def _losses(results: Results) -> tuple[str, dict[int, float]]:
    """The row that the law takes for one stream, and P -> held-out loss."""
    rows = {x.name: x for x in results.models}
    one = next(name for name in (CONTROL, ADAPTED, BACKBONE) if name in rows)
    streams = {x.num_streams: x.loss for x in rows.values() if x.num_streams > 1}
    return one, {1: rows[one].loss} | streams


def plot_fitted_law(results: Results) -> "Figure":
    """Held-out loss against P, with the law fitted to this run, its band and its next P."""
    figure, axes = axes_of(results, "P (parallel streams)", "held-out loss (nats per token)")
    fitted, (one, measured) = fit(results), _losses(results)
    assert not isinstance(fitted, str)
    p_values = [*measured, 2 * max(measured)]
    low, high = zip(*map(fitted.band, p_values), strict=True)
    color = BLUES[0]
    axes.plot(p_values, [fitted.loss(p) for p in p_values], color=color, label="the law, fitted")
    axes.fill_between(
        p_values, low, high, color=color, alpha=0.2, linewidth=0, label="its 95 % band"
    )
    points = zip(*measured.items(), strict=True)
    axes.plot(*points, "o", color=BLUES[1], label=f"measured; at 1 the {one}")
    show_p(axes, p_values)
    axes.legend(frameon=False)
    return figure


def plot_paper_law(results: Results) -> "Figure":
    """Contours of the loss that the paper's law gives N parameters and P streams."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = axes_of(results, "parameters (N)", "P (parallel streams)")
    law, scale = PAPER[CORPUS], scale_of(results)
    low, high = min(scale / 2, 5e8), max(scale * 2, 5e9)
    sizes = [low * (high / low) ** (step / 60) for step in range(61)]
    p_values = [2 ** (step / 10) for step in range(41)]
    drawn = axes.contour(
        sizes,
        p_values,
        [[law.loss(n, p) for n in sizes] for p in p_values],
        levels=10,
        colors=GREY,
        linewidths=0.8,
    )
    axes.set_title(axes.get_title(), parse_math=False, pad=18)  # above the numbers of the lines
    top = PAPER_P[-1]
    for loss in map(float, drawn.levels):
        size = law.A / (loss - law.E) ** (1 / law.alpha) / law.equal_parameters(1, top)
        if low < size < high:
            axes.annotate(
                f"{loss:g}",
                (size, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    trained = sorted({1, *(x.num_streams for x in results.models)})
    axes.plot([scale] * len(trained), trained, "o-", color=BLUES[1], label="this model")
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.93, top)
    axes.yaxis.set_major_locator(FixedLocator(PAPER_P))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = [n for n in (1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, 2e10, 5e10, 1e11) if low <= n <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1e9:g}B" if n >= 1e9 else f"{n / 1e6:g}M")
    )
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", frameon=False)
    return figure
