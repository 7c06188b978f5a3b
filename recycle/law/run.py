"""The law through the points of one run, which are fewer than its parameters.

E and α are held at the paper's; A and k follow from the run's losses by least squares on log L.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recycle.results import Results

from .law import PAPER, Law
from .points import PointsError, rows_on_law

DRAWS = 200
STEPS = 50  # of Gauss-Newton; it needs about six


@dataclass(frozen=True)
class RunLaw:
    """The law of a run, and of as many resamples of its test documents.

    It was found on models trained from scratch: on a frozen backbone it is an extrapolation.
    """

    law: Law
    draws: tuple[Law, ...]
    parameters: float
    """N of the model that the streams are put on."""
    stream: float
    """Parameters that a stream adds."""

    def loss(self, p: float) -> float:
        """L with P streams, in nats per token."""
        return self.law.loss(self._n(p), p)

    def band(self, p: float, level: float = 0.95) -> tuple[float, float]:
        """The interval of L with P streams that holds this share of the draws."""
        losses = [law.loss(self._n(p), p) for law in self.draws]
        low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _n(self, p: float) -> float:
        return self.parameters + (self.stream * p if p > 1 else 0)


def fit_run(record: Results, like: Law = PAPER["stack-v2-python"], seed: int = 0) -> RunLaw | str:
    """The law of one run, with E and α of another.

    Args:
        record: Of the run.
        like: Whose E and α to hold.
        seed: Of the resampling.

    Returns:
        A sentence that says why there is none, where there is none.
    """
    try:
        rows = rows_on_law(record)
    except PointsError as error:
        return str(error)
    if len(rows) < 3:
        return f"The law takes three points or more, and the run has {len(rows)}."
    tokens = np.array(record.tokens, dtype=float)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), DRAWS)
    weights = np.concatenate([np.ones((1, len(tokens))), counts]) * tokens  # [1 + draws, documents]
    losses = weights @ np.array([row.losses for row, _ in rows]).T / weights.sum(1, keepdims=True)
    if not np.isfinite(losses).all() or losses.min() <= like.E:
        return (
            f"A loss of {losses.min():.4f}, of the test documents or a resample of them, is not "
            f"above E = {like.E} of the law that this run is compared with."
        )
    p = np.array([row.num_streams for row, _ in rows])
    n = np.array([n for _, n in rows], dtype=float)
    a, k = _least_squares(losses, n, np.log(p), like)
    if k[0] == 0:
        return "The losses do not fall with P, so the law has nothing to say of them."
    laws = [
        Law(like.E, float(x), like.alpha, float(y), math.nan) for x, y in zip(a, k, strict=True)
    ]
    left = losses[0] - [laws[0].loss(*each) for each in zip(n, p, strict=True)]
    r2 = 1 - float(left @ left) / float(((losses[0] - losses[0].mean()) ** 2).sum())
    base, largest = record.backbone.non_embedding_parameters, p.argmax()
    assert base is not None
    law, stream = replace(laws[0], r2=r2), (n[largest] - base) / p[largest]
    return RunLaw(law, tuple(laws[1:]), base, float(stream))


def _least_squares(
    losses: NDArray[np.float64], n: NDArray[np.float64], log_p: NDArray[np.float64], like: Law
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A and k of each row of losses [draws, points], k at least 0.

    Where log L is near enough, (L − E)^(−1/α) = N (k ln P + 1) / A is a line in ln P: the start.
    """
    y = (losses - like.E) ** (-1 / like.alpha) / n
    slope, intercept = np.polyfit(log_p, y.T, 1)
    # A line that starts below zero has no A: take it from the mean.
    a = -np.log(np.where(intercept > 0, intercept, y.mean(1)))
    k = np.clip(np.where(intercept > 0, slope * np.exp(a), 0), 0, 100)
    for _ in range(STEPS):
        scale = k[:, None] * log_p + 1
        reach = like.alpha * (a[:, None] - np.log(n * scale))
        predicted = np.logaddexp(np.log(like.E), reach)
        by_a = like.alpha * np.exp(reach - predicted)
        by_k = -by_a * log_p / scale
        error = np.log(losses) - predicted
        g_a, g_k = (by_a * error).sum(1), (by_k * error).sum(1)
        aa, ak, kk = (by_a**2).sum(1), (by_a * by_k).sum(1), (by_k**2).sum(1)
        held = (k == 0) & (aa * g_k <= ak * g_a)  # it would fall below 0
        determinant = aa * kk - ak**2
        a = a + np.where(held, g_a / aa, (kk * g_a - ak * g_k) / determinant)
        k = np.where(held, 0, np.clip(k + (aa * g_k - ak * g_a) / determinant, 0, 2 * k + 1))
    return np.exp(a), k
