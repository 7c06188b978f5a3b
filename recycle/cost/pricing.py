"""What a run takes, from what a token takes: one sum for costs that are measured or computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

# A step of all weights against one of a LoRA: three products of matrices for two.
ALL_WEIGHTS = 1.5


@dataclass(frozen=True)
class PassCost:
    """What a text token takes."""

    learning: float
    """Seconds of a forward and backward pass."""
    reading: float
    """Seconds of a forward pass."""
    gib: float
    """Memory in training, of a whole micro-batch, and of AdamW."""

    def between(self, alone: "PassCost", share: float) -> "PassCost":
        """The cost of fewer streams: 0 is that of none, 1 is this."""
        reading = alone.reading + share * (self.reading - alone.reading)
        return PassCost(reading * self.learning / self.reading, reading, self.gib)

    def with_all_weights(self, parameters: int, itemsize: int) -> "PassCost":
        """The cost where all weights learn: in float32, with a gradient and two moments.

        Args:
            parameters: How many there are.
            itemsize: Bytes of one, as this cost has them.
        """
        more = (16 - itemsize) * parameters / 2**30
        return replace(self, learning=self.learning * ALL_WEIGHTS, gib=self.gib + more)


@dataclass(frozen=True)
class Work:
    """One training, and what is measured of what it learned."""

    name: str
    learned: int
    """Text tokens that are left to learn from."""
    read: int
    """Text tokens of validations and of the comparison."""
    cost: PassCost
    done: int = 0
    """Text tokens learned from before."""

    @property
    def seconds(self) -> float:
        return self.learned * self.cost.learning + self.read * self.cost.reading


def total(works: Sequence[Work]) -> tuple[float, float]:
    """Seconds of all trainings, one after the other, and GiB of the largest."""
    return sum(work.seconds for work in works), max(work.cost.gib for work in works)
