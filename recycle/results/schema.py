"""Everything that is known of one run: the schema of `results.json`.

This is the full local record, with the paths of its machine. What is made to be published (the
report and the model card) shows the last part of a path only.
"""

import math
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from .comparison import (
    Difference,
    Measurement,
    ModelResult,
    ScoredDocument,
    compare,
    paired_difference,
)
from .estimates import Estimates
from .machine import Hardware
from .record import Loss, Record
from .tasks import Sample, TaskResult

SCHEMA_VERSION: Final = 2


def _utc(date: datetime) -> datetime:
    return date.astimezone(UTC).replace(microsecond=0)


class BackboneRecord(Record):
    """The frozen model under the adapters."""

    id: str
    """As in the recipe: Hub id, folder, or package://PACKAGE/FILE.gguf."""
    source: Literal["hub", "folder", "package"]
    revision: str | None = None
    fingerprint: str
    dtype: str
    quantization: str | None = None
    """What it was loaded in: int8, nf4, or the name of the checkpoint's own method, as "gptq"."""
    parameters: PositiveInt
    non_embedding_parameters: PositiveInt | None = None
    """N of the scaling law; None in records from before it was counted."""
    model_type: str
    vocab_size: PositiveInt
    license: str | None = None


class FirstMeasurement(Record):
    """What the run that trained the adapters measured, where they are measured again."""

    date: Annotated[AwareDatetime, AfterValidator(_utc)]
    dtype: str
    """What the backbone computed in, in training too."""
    quantization: str | None = None
    """Quantisation of the backbone, in training too; named as in `BackboneRecord`."""
    losses: dict[str, tuple[Loss, ...]]
    """Name of a model in the table -> nats per token of each test document, in their order."""


class DataRecord(Record):
    """Where the text came from."""

    source: str
    """As in the recipe: hub, files, ..."""
    path: str | None = None
    license: str | None = None
    facts: dict[str, JsonValue]
    """What `recycle.data` found: sizes of the splits, documents left out, hashes."""


class LossPoint(Record):
    """Training loss at one step."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    """Text tokens seen so far."""
    loss: Loss


class CurvePoint(Record):
    """Validation losses at one step."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    """Text tokens seen so far."""
    validation_loss: dict[str, Loss]
    """Name of a model in the table -> nats per token."""


class TrainingRecord(Record):
    """One training: the weights, the whole nested family, one independent P, or the control."""

    name: str
    """"adapted" (the first stage), "nested", "p2"..., "control", and "compared" (weights alone)."""
    p_values: tuple[PositiveInt, ...]
    """The P that it trained; (1,) where there is one stream or none."""
    tokens: NonNegativeInt
    """Text tokens learned from: of conversations, those of all rows with their padding."""
    learned_tokens: NonNegativeInt | None = None
    """Those that were predicted: of conversations, the assistant's turns alone."""
    master_dtype: str | None = None
    """Number format in which all weights learned, where they did."""
    steps: NonNegativeInt
    processes: PositiveInt = 1
    """That shared each of its last steps, each with a GPU of its own where there are GPUs."""
    wall_seconds: NonNegativeFloat
    tokens_per_second: NonNegativeFloat | None = None
    """Text tokens a second; None without a training step."""
    stream_tokens_per_second: NonNegativeFloat | None = None
    """Text tokens times the streams they ran through, a second."""
    flops_per_token: NonNegativeFloat | None = None
    """Floating-point operations of the forward and backward pass, counted on one row."""
    kept_step: NonNegativeInt | None = None
    """The step of the lowest validation loss, at which what was learned is kept."""
    curve: tuple[CurvePoint, ...] = ()
    train_loss: tuple[LossPoint, ...] = ()


class WallSeconds(Record):
    """Where the time of the run went."""

    setup: NonNegativeFloat
    training: NonNegativeFloat
    evaluation: NonNegativeFloat
    announced: NonNegativeFloat | None = None
    """What the run said, before it trained, that training and evaluation would take."""


class MemoryGib(Record):
    """Peak memory of the run, of the GPU or of the process."""

    announced: NonNegativeFloat
    """What the run said, before it trained."""
    taken: NonNegativeFloat


class Results(Record):
    """Everything that is known of one run. `models` must be what `compare` makes of the losses."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    date: Annotated[AwareDatetime, AfterValidator(_utc)]
    command: str
    recipe: dict[str, JsonValue]
    """The resolved recipe."""
    recipe_identity: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    packages: dict[str, str]
    hardware: Hardware
    seeds: dict[str, int]
    backbone: BackboneRecord
    data: DataRecord
    """Of the last stage, which the test documents are from."""
    adapt_data: DataRecord | None = None
    """Of the first stage, where there is one."""
    training: tuple[TrainingRecord, ...]
    documents: tuple[ScoredDocument, ...]
    models: tuple[ModelResult, ...]
    """In the order of the table; the backbone first."""
    wall_seconds: WallSeconds
    memory_gib: MemoryGib | None = None
    """None in records from before it was measured."""
    estimates: Estimates | None = None
    """Of inference with each P, as they were announced; None in earlier records."""
    samples: tuple[Sample, ...] = ()
    """How each row goes on with the same prompts."""
    tasks: tuple[TaskResult, ...] = ()
    """What `recycle eval` measured later, on tasks and on other data."""
    first: FirstMeasurement | None = None
    """What the run itself measured, where this is a later measurement by `recycle eval`."""

    @model_validator(mode="after")
    def _derived_numbers_follow_from_losses(self) -> Self:
        for model, computed in zip(self.models, compare(self.documents, self.models), strict=True):
            got, expected = (
                x.model_dump(exclude=set(Measurement.model_fields)) for x in (model, computed)
            )
            if not _same(got, expected):
                raise ValueError(
                    f"the numbers of model {model.name!r} do not follow from its losses: "
                    f"the file has {got}, its losses give {expected}"
                )
        return self

    @model_validator(mode="after")
    def _both_measurements_are_of_the_same_models(self) -> Self:
        if self.first is None:
            return self
        before, now = list(self.first.losses), [model.name for model in self.models]
        if before != now:
            raise ValueError(f"the run measured {before}, and this measurement is of {now}")
        self.minus_first()  # of the same documents
        return self

    def minus_first(self) -> dict[str, Difference]:
        """This measurement minus the run's own, for each model; empty where it is the run's own."""
        if self.first is None:
            return {}
        first, tokens = self.first.losses, self.tokens
        return {x.name: paired_difference(x.losses, first[x.name], tokens) for x in self.models}

    @property
    def tokens(self) -> list[int]:
        """Predicted tokens of each test document."""
        return [document.tokens for document in self.documents]


def precision(backbone: BackboneRecord | FirstMeasurement) -> str:
    """`bfloat16`, or `nf4 computing in bfloat16`."""
    if backbone.quantization is None:
        return backbone.dtype
    return f"{backbone.quantization} computing in {backbone.dtype}"


def _same(a: object, b: object) -> bool:
    """Whether two are equal but for the last digits of floats, where Python versions differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or (a != a and b != b)
    return a == b
