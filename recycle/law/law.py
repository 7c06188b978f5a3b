"""The scaling law of parallel streams (arXiv 2505.10475, section 3.2).

    L = E + (A / (N (k ln P + 1)))^α

N parameters outside the embeddings, P streams, L nats per token after the same tokens of training.
It was found on models trained from scratch: on a frozen backbone it is an extrapolation.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One trained model."""

    parameters: float
    """N."""
    p: int
    loss: float


@dataclass(frozen=True)
class Law:
    """The law with its parameters."""

    E: float
    A: float
    alpha: float
    k: float
    r2: float
    """Share of the losses' variance that it explains."""

    def loss(self, parameters: float, p: float) -> float:
        """L of N parameters and P streams."""
        return self.E + (self.A / self.equal_parameters(parameters, p)) ** self.alpha

    def equal_parameters(self, parameters: float, p: float) -> float:
        """Parameters of the model that reaches the same loss with one stream: N (k ln P + 1)."""
        return parameters * (self.k * math.log(p) + 1)


PAPER = {
    "stack-v2-python": Law(E=0.6912, A=1.1306e7, alpha=0.1894, k=0.3935, r2=0.9978),
    "pile": Law(E=1.2888, A=1.9735e8, alpha=0.1963, k=0.3345, r2=0.9987),
}
"""By corpus, as the paper prints them; `recycle fit --paper CORPUS` finds them again."""
