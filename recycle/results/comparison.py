"""What was measured of each model, and the differences that follow from it.

Losses are in nats per predicted token; a difference is `model - other`, so below zero is better.
"""

import math
import statistics
from collections.abc import Sequence

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from .record import Loss, Record

BACKBONE = "backbone"
CONTROL = "control"
"""One stream with a prefix, trained on the same tokens. Not "P = 1": that is the backbone."""


class ScoredDocument(Record):
    """One test document, of which one block is scored."""

    name: str
    group: str
    tokens: PositiveInt
    """Predicted tokens; the same for every document."""
    bytes: PositiveInt
    """UTF-8 bytes of the text that these tokens are."""


class Difference(Record):
    """Mean over the documents of the difference of two models' losses, in nats per token."""

    mean: Loss
    """No number (NaN) where one of the losses is not finite."""
    standard_error: NonNegativeFloat | None
    """None where it cannot be told: of one document, or of losses that are not finite."""

    @property
    def distinguishable(self) -> bool:
        """Whether the mean is at least two standard errors away from zero."""
        if self.standard_error is None:
            return False
        return self.mean != 0 and abs(self.mean) >= 2 * self.standard_error


class Speed(Record):
    """Text tokens a second; None where not measured, as in training for the backbone."""

    train_tokens_per_second: NonNegativeFloat | None = None
    prefill_tokens_per_second: NonNegativeFloat | None = None
    decode_tokens_per_second: NonNegativeFloat | None = None


class Measurement(Record):
    """What was measured of one model; `compare` makes a `ModelResult` of it."""

    name: str
    """The name of its row: "backbone", "control", "P = 2"..."""
    num_streams: PositiveInt
    losses: tuple[Loss, ...]
    """Nats per token of each test document, in the order of the documents."""
    adapter_parameters: NonNegativeInt
    kv_bytes_per_token: PositiveInt
    speed: Speed = Speed()


class ModelResult(Measurement):
    """One row of the table: the measurement and what follows from it."""

    loss: Loss
    bits_per_byte: Loss
    minus_backbone: Difference | None
    """None for the backbone."""
    minus_control: Difference | None
    """None for the backbone, the control, and where no control was trained."""


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of a − b over documents and its standard error: standard deviation (ddof 1) / sqrt(n).

    Args:
        a: loss of each document under one model.
        b: loss of the same documents, in the same order, under the other.

    Raises:
        ValueError: of different lengths, or no document.
    """
    if len(a) != len(b) or not a:
        raise ValueError(
            "a paired difference takes the losses of the same documents, one or more, "
            f"under both models; got {len(a)} and {len(b)}"
        )
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Difference(mean=math.nan, standard_error=None)
    error = None
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean=statistics.fmean(differences), standard_error=error)


def compare(
    documents: Sequence[ScoredDocument], measurements: Sequence[Measurement]
) -> tuple[ModelResult, ...]:
    """Derive every row of the table from the losses of each document.

    A model's loss is the mean over documents, so that each counts the same however long it is. Bits
    per byte are those of all documents over the bytes of all.

    Args:
        documents: the test documents.
        measurements: one for each model, the backbone first.

    Raises:
        ValueError: what was measured cannot be compared.
    """
    names = [measured.name for measured in measurements]
    if names[:1] != [BACKBONE] or len(set(names)) != len(names):
        raise ValueError(f"the models must be the {BACKBONE!r} and others of other names: {names}")
    if not documents:
        raise ValueError("there is no test document, so nothing to compare")
    for measured in measurements:
        if len(measured.losses) != len(documents):
            raise ValueError(
                f"model {measured.name!r} has {len(measured.losses)} losses "
                f"for {len(documents)} test documents"
            )
    losses = {measured.name: measured.losses for measured in measurements}
    tokens = [document.tokens for document in documents]
    nats_per_bit_of_all = math.log(2) * sum(document.bytes for document in documents)

    def minus(name: str, other: str) -> Difference | None:
        if name in (BACKBONE, other) or other not in losses:
            return None
        return paired_difference(losses[name], losses[other])

    rows = []
    for measured in measurements:
        nats = math.fsum(x * n for x, n in zip(measured.losses, tokens, strict=True))
        rows.append(
            ModelResult(
                **{field: getattr(measured, field) for field in Measurement.model_fields},
                loss=statistics.fmean(measured.losses),
                bits_per_byte=nats / nats_per_bit_of_all,
                minus_backbone=minus(measured.name, BACKBONE),
                minus_control=minus(measured.name, CONTROL),
            )
        )
    return tuple(rows)
