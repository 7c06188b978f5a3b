"""What one training is to do, settled before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recycle.recipe import Training


@dataclass(frozen=True)
class TrainingPlan:
    """One training of a run: one adapter, and all P that it learns to serve."""

    adapter: str
    p_values: tuple[int, ...]
    steps: int
    """Optimiser steps; 0 leaves the adapter at its start."""
    block_size: int
    """Tokens of a block."""
    learning_rates: Mapping[str, float]
    """By the group of parameters, "prefix" and "aggregator"."""
    settings: Training
    """Batch, schedule, seed, and how often to validate and to save."""
    log_steps: int
    """Steps between two points of the recorded training loss."""
    folder: Path
    """Of its checkpoints, and of what it learned when it is finished."""

    @property
    def num_streams(self) -> int:
        return self.p_values[-1]

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_size * self.block_size

    @property
    def tokens(self) -> int:
        """Text tokens that it learns from."""
        return self.steps * self.tokens_per_step

    def validations(self, done: int) -> int:
        """Measurements of the validation loss that are left after so many steps."""
        every = self.settings.validation_steps
        if done >= self.steps:
            return 0
        regular = (self.steps - 1) // every - done // every
        return regular + 1 + (done == 0)  # the last step, and the start
