"""What one training is to do, settled before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from recycle import world
from recycle.cost.shape import Shape
from recycle.cost.training import Learner
from recycle.parscale import ActiveStreams
from recycle.recipe import Training
from recycle.results import TrainingRecord

# The field of a recipe that each group's learning rate is from, in a stage or the comparison.
RATE_FIELDS = {
    "prefix": "stages.streams.prefix_learning_rate or stages.streams.control_learning_rate",
    "aggregator": "stages.streams.aggregator_learning_rate",
    "lora": "stages.adapt.learning_rate or evaluation.compare_learning_rate",
    "full": "stages.adapt.learning_rate or stages.streams.weights_learning_rate",
}
ADVICE = (
    "The last good checkpoint is kept. Lower {}, and start in a new folder with output.dir=FOLDER."
)


@dataclass(frozen=True)
class Tracking:
    """Where the numbers of one training are tracked."""

    to: str
    """"trackio", "tensorboard" or "wandb"."""
    project: str
    """The recipe's name."""
    folder: Path
    """The run's, for all logs; they outlive the checkpoints."""
    training: str

    @property
    def run(self) -> str:
        """What the training is called beside those of other run folders."""
        return f"{self.folder.parent.name}/{self.training}"


@dataclass(frozen=True)
class TrainingPlan:
    """One training: streams for the P that they learn to serve, or the weights at P = 1."""

    adapter: str
    """Its name: that of an adapter, or "adapted" and "compared" where the weights learn."""
    rows: tuple[str, ...]
    """What its models are called in the table, one for each P."""
    p_values: tuple[int, ...]
    steps: int
    """Optimiser steps; 0 leaves it at its start."""
    block_size: int
    """Tokens of a block."""
    learning_rates: Mapping[str, float]
    """By the group of parameters: "prefix", "aggregator", "lora", and "full" for all weights."""
    settings: Training
    """Batch, schedule, seed, and how often to validate and to save."""
    log_steps: int
    """Steps between two points of the recorded training loss."""
    folder: Path
    """Of its checkpoints, and of what it learned when it is finished."""
    dtype: str = "float32"
    """What the backbone computes in."""
    loss_weights: Mapping[int, float] = field(default_factory=dict)
    """Weight of each P in the loss; 1 where not given."""
    in_order: bool = False
    """Rows are read one after the other, the first stage's before the second's."""
    own_loss: float = 0.0
    """Share of the loss that is the mean of what each stream alone would have."""
    tracking: Tracking | None = None
    at_once: int | None = None
    """Streams whose activations are held at once; None is all."""
    sections: tuple[str, str] = ("training", "data")
    """Where its recipe sets the micro-batch and the block size."""

    @property
    def active(self) -> ActiveStreams | None:
        """The streams that learn; None where there are none."""
        if "prefix" not in self.learning_rates:
            return None
        return ActiveStreams(self.adapter, self.p_values[-1], self.p_values)

    @property
    def all_weights(self) -> bool:
        """Whether the backbone's own weights learn."""
        return "full" in self.learning_rates

    def frozen(self) -> "TrainingPlan":
        """The same without the backbone's own weights."""
        rates = {group: rate for group, rate in self.learning_rates.items() if group != "full"}
        return replace(self, learning_rates=rates)

    def learner(self, shape: Shape, prefix: int, lora: int, shards: int = 1) -> Learner:
        """What it takes memory and time for.

        Args:
            shape: The backbone's.
            prefix: Learned tokens of each stream.
            lora: Parameters of a LoRA, where one learns.
            shards: Processes that each hold a part of every layer.
        """
        streams = self.active is not None
        learned = 0 if self.all_weights else lora
        if streams:
            learned = shape.adapter_parameters(self.p_values, prefix)
        return Learner(
            p_values=self.p_values,
            learned=learned,
            in_weights=self.all_weights or not streams,
            block_size=self.block_size,
            prefix=prefix * streams,
            apart=self.own_loss > 0,
            at_once=self.at_once,
            shards=shards,
        )

    @property
    def micro_batch_size(self) -> int:
        """Blocks in a forward pass of a process, once `fit` has settled their most."""
        most, blocks = self.settings.micro_batch_size, self.blocks_per_process
        assert most != "auto"
        return max(n for n in range(1, min(most, blocks) + 1) if blocks % n == 0)

    @property
    def blocks_per_process(self) -> int:
        """Blocks of a step that each process takes."""
        return self.settings.batch_size // world.size()

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


def advice(plan: TrainingPlan) -> str:
    """What to do about a training that breaks down."""
    return ADVICE.format(", or ".join(RATE_FIELDS[group] for group in plan.learning_rates))


def first_record(plan: TrainingPlan) -> TrainingRecord:
    """The record of a training before its first step."""
    return TrainingRecord(
        name=plan.adapter,
        p_values=plan.p_values,
        tokens=0,
        steps=0,
        processes=world.size(),
        wall_seconds=0,
        master_dtype="float32" if plan.all_weights else None,
    )
