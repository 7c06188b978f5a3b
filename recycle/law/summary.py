"""What a fit found, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .fit import PARAMETERS, at_bounds, interval
from .law import Law, Point

WARNING = (
    "The law was found on models trained from scratch. Of a frozen backbone it is an extrapolation."
)
ONE_SIZE = (
    "All points have about one N: they fix A and E only together, and say nothing of another N."
)


def summarise(
    points: Sequence[Point],
    law: Law,
    draws: Sequence[Law],
    forecasts: Sequence[tuple[float, int]] = (),
) -> dict[str, Any]:
    """The fit as JSON; intervals hold 95 % of the draws, and are None where there is no draw.

    Args:
        points: What was fitted.
        law: The fit.
        draws: Fits of resampled points.
        forecasts: N and P whose losses are asked for.
    """

    def found(of: Any) -> list[float] | None:
        return list(interval(map(of, draws))) if draws else None

    ends = [
        f"{name} = {getattr(law, name):.3g} is an end of its range: the points do not fix it."
        for name in at_bounds(law)
    ]
    sizes = [x.parameters for x in points]
    return {
        **{name: getattr(law, name) for name in (*PARAMETERS, "r2")},
        "points": len(points),
        "intervals": {name: found(lambda x, name=name: getattr(x, name)) for name in PARAMETERS},
        "forecasts": [
            {"parameters": n, "p": p, "loss": law.loss(n, p)}
            | {"interval": found(lambda x, n=n, p=p: x.loss(n, p))}
            for n, p in forecasts
        ],
        # Streams add some percent to N.
        "notes": [WARNING, *([ONE_SIZE] if max(sizes) < 1.5 * min(sizes) else []), *ends],
    }


def tabulate(summary: dict[str, Any]) -> Table:
    """The same for a terminal."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(f"{summary['points']} points, R² {summary['r2']:.4f}")
    for heading in ("value", "95 % interval"):
        table.add_column(heading, justify="right")
    for name in PARAMETERS:
        table.add_row(name, *_cells(summary[name], summary["intervals"][name]))
    for x in summary["forecasts"]:
        cells = _cells(x["loss"], x["interval"])
        table.add_row(f"L, N = {x['parameters']:.4g}, P = {x['p']}", *cells)
    return table


def _cells(value: float, interval: list[float] | None) -> tuple[str, str]:
    between = "–" if interval is None else " to ".join(map(_number, interval))
    return _number(value), between


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4e}"
