"""The law fitted to losses, with intervals by resampling.

A fit starts from every point of upstream's grid (QwenLM/ParScale, parametric_fit.py) and keeps the
best end. It works on log L = logaddexp(log E, α (log A - log N - log(k ln P + 1))), so that nothing
overflows, and has the gradient by hand.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from recycle.errors import RecycleError

from .law import Law, Point

Array = NDArray[np.float64]

PARAMETERS = ("E", "A", "alpha", "k")
DELTA = 1e-3  # where Huber's loss turns from a square into a line
BILLION = 1e9  # N and A are counted in it, which keeps the four parameters of one size
GRID = tuple(
    product(
        (-1.0, -0.5, 0.0),
        (-4.0, -2.0, 0.0, 2.0, 4.0),
        (0.0, 0.5, 1.0, 1.5, 2.0),
        (0.2, 0.4, 0.6, 0.8),
    )
)
"""Starts of log E, log A, α and k."""
BOUNDS = ((-18.0, None), (-18.0, 18.0), (1e-8, 8.0), (1e-8, 1e4))


class LawError(RecycleError):
    """The law cannot be fitted to what was given."""


def fit(points: Sequence[Point]) -> Law:
    """The law of least Huber loss on log L.

    Args:
        points: Trained models, of at least as many sites (N, P) as the law has parameters.

    Raises:
        LawError: There are fewer, all have one P or one loss, or a number is impossible.
    """
    check(points)
    return _law(_fit(points, np.ones(len(points)), GRID), points)


def bootstrap(
    points: Sequence[Point], law: Law, draws: int = 200, seed: int = 0
) -> tuple[Law, ...]:
    """The laws of resampled points, each found from that of all points.

    A draw with fewer sites (N, P) than the law has parameters, or with one P or one loss, says
    nothing of it and is drawn again.

    Args:
        points: As in `fit`.
        law: What `fit` made of them.
        draws: How many.
        seed: Of the resampling.

    Returns:
        Nothing where there are just as many points as parameters: every draw would be all of them.
    """
    if len(points) <= len(PARAMETERS):
        return ()
    rng = np.random.default_rng(seed)
    laws: list[Law] = []
    start = (math.log(law.E), math.log(law.A / BILLION), law.alpha, law.k)
    starts = (start, *((start[0] + e, *start[1:]) for e in (-0.3, 0.1)))
    while len(laws) < draws:
        counts = np.bincount(rng.integers(len(points), size=len(points)), minlength=len(points))
        drawn = [point for point, count in zip(points, counts, strict=True) if count]
        varied = all(len({getattr(x, name) for x in drawn}) > 1 for name in ("p", "loss"))
        if varied and _sites(drawn) >= len(PARAMETERS):
            laws.append(_law(_fit(drawn, counts[counts > 0].astype(float), starts), points))
    return tuple(laws)


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds this share of the values."""
    low, high = np.quantile(list(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check(points: Sequence[Point]) -> None:
    """Raise `LawError` where the law cannot be fitted to these points."""
    for x in points:
        if not (0 < x.loss < 1e6 and 1 <= x.parameters <= 1e18 and x.p in range(1, 1025)):
            raise LawError(
                "The law takes losses above 0 and below 1e6, N from 1 to 1e18 and whole P from 1 "
                f"to 1,024, got {x}. Leave out that run, or measure it again with `recycle eval`."
            )
    if (sites := _sites(points)) < len(PARAMETERS):
        raise LawError(
            f"The law has {len(PARAMETERS)} parameters ({', '.join(PARAMETERS)}) and takes at "
            f"least as many pairs of N and P, got {sites}: it would forecast anything. Add runs "
            "with more P (streams=2,4,8), or of a second backbone on the same data; seeds add none."
        )
    if len({x.p for x in points}) == 1:
        raise LawError(
            f"All {len(points)} points have P = {points[0].p}, which leaves k open. Add runs of "
            "another P, such as streams=2,4,8."
        )
    if len({x.loss for x in points}) == 1:
        raise LawError(
            f"All {len(points)} points have a loss of {points[0].loss:g}, which leaves nothing to "
            "fit. Give the measured losses, with all their digits."
        )


def at_bounds(law: Law) -> list[str]:
    """Names of the parameters that the search left at the end of their range."""
    ranges = {"E": (1e-4, math.inf), "alpha": (1e-4, 7.9), "k": (1e-4, 9e3)}
    return [x for x, (low, high) in ranges.items() if not low < getattr(law, x) < high]


def huber(
    parameters: Array, n: Array, log_p: Array, log_loss: Array, w: Array
) -> tuple[float, Array]:
    """Huber's loss over δ², and its gradient.

    Args:
        parameters: log E, log A, α and k.
        n: log N of each point.
        log_p: log P of each.
        log_loss: log L of each.
        w: How often each counts.
    """
    e, a, alpha, k = parameters
    scale = k * log_p + 1
    reach = a - n - np.log(scale)  # log of A / (N (k ln P + 1))
    predicted = np.logaddexp(e, alpha * reach)
    share = np.exp(alpha * reach - predicted)  # of the loss, what is not E
    error = (predicted - log_loss) / DELTA
    slope = w * np.clip(error, -1, 1) / DELTA
    value = w @ np.where(abs(error) <= 1, error**2 / 2, abs(error) - 0.5)
    by_alpha = slope * share
    gradient = (
        *(slope @ (1 - share), alpha * by_alpha.sum(), by_alpha @ reach),
        -alpha * (by_alpha @ (log_p / scale)),
    )
    return float(value), np.array(gradient)


def _sites(points: Iterable[Point]) -> int:
    return len({(x.parameters, x.p) for x in points})


def _fit(points: Sequence[Point], weights: Array, starts: Iterable[Sequence[float]]) -> Array:
    n = np.log([x.parameters / BILLION for x in points])
    data = (n, np.log([x.p for x in points]), np.log([x.loss for x in points]), weights)
    ends = (minimize(huber, x, data, "L-BFGS-B", jac=True, bounds=BOUNDS) for x in starts)
    best = min(ends, key=lambda end: float(end.fun)).x
    exact = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    return np.asarray(
        minimize(huber, best, data, "L-BFGS-B", jac=True, bounds=BOUNDS, options=exact).x
    )


def _law(x: Array, points: Sequence[Point]) -> Law:
    law = Law(math.exp(x[0]), math.exp(x[1]) * BILLION, float(x[2]), float(x[3]), math.nan)
    losses = np.array([x.loss for x in points])
    left = losses - [law.loss(x.parameters, x.p) for x in points]
    spread = losses - losses.mean()
    r2 = 1 - float(left @ left) / float(spread @ spread)
    return Law(law.E, law.A, law.alpha, law.k, r2)
