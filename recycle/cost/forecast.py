"""What `recycle plan` says: the record that its tables and its JSON are made from."""

from recycle.results import Estimates
from recycle.results.record import Record

from .scaling import PaperExample, Scaling


class TrainingForecast(Record):
    """One training of the run, and the measurements of what it learns."""

    name: str
    p_values: tuple[int, ...]
    """(1,) where there is one stream or none."""
    tokens: int
    """Text tokens that it learns from."""
    learned_parameters: int
    flops: float
    """Of learning."""
    seconds: float
    memory_gib: float
    """With the recipe's micro-batch and gradient checkpointing."""
    micro_batch_size: int
    """The recipe's."""
    fits: int | None
    """Largest micro-batch that divides a GPU's share of the batch and fits; None where none does.
    """
    fits_with_checkpointing: int | None
    """The same with gradient checkpointing."""


class Forecast(Estimates):
    """Inference with each P, the training of a recipe, and parameter scaling."""

    model: str
    model_type: str
    parameters: int
    non_embedding_parameters: int
    output_head_gib: float
    """Of an output head with a matrix of its own, which `memory_gib` leaves out as upstream does;
    0 where it is the embedding's."""
    gpu_memory_gib: float
    gpu_chosen: str
    """Why this GPU."""
    quantization: str | None
    num_virtual_tokens: int
    training: tuple[TrainingForecast, ...]
    """In their order."""
    processes: int
    """GPUs that share the training, without the time in which they wait for each other."""
    sharded: bool
    """Whether each of them holds a part of the backbone only."""
    training_seconds: float
    """Of all, with the comparison."""
    training_memory_gib: float
    """Of the largest, on each GPU."""
    scaling: Scaling | None
    """For the most streams; None without streams."""
    paper: PaperExample
    notes: tuple[str, ...] = ()
    """What to watch."""
