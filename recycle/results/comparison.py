"""What was measured of each model, and the differences that follow from it.

Losses are in nats per predicted token; a difference is `model - other`, so below zero is better.
"""

import math
from collections.abc import Sequence

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from .record import Loss, Record

BACKBONE = "backbone"
ADAPTED = "P = 1"
"""The backbone with its weights adapted, where a first stage did that; else it is the backbone."""
LORA = "LoRA"
WEIGHTS = "all weights"
"""The weights alone, at P = 1, on the tokens of both stages: a LoRA, or all of them."""
CONTROL = "control"
"""One stream with a prefix, trained on the same tokens. Not "P = 1": that has no stream."""


class ScoredDocument(Record):
    """One test document, of which one block is scored."""

    name: str
    group: str
    tokens: PositiveInt
    """Predicted tokens."""
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


class StreamUse(Record):
    """What the streams of one P do, over the predicted tokens of all test documents."""

    weights: tuple[NonNegativeFloat, ...]
    """Mean aggregation weight of each stream; together 1."""
    entropy: NonNegativeFloat
    """Mean entropy of the weights in nats; ln P where every stream weighs the same."""
    error_correlation: float | None
    """Mean over pairs of streams of the Pearson correlation of their losses by token, each stream's
    own; None where a stream's losses do not vary or are not finite."""


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
    right: tuple[bool, ...] | None = None
    """Whether each document's question was answered right, where documents ask one."""
    train_seconds: NonNegativeFloat | None = None
    """Of all trainings behind it; one training of a nested family is behind each of its P."""
    train_flops: NonNegativeFloat | None = None
    """Floating-point operations of the same."""
    streams: StreamUse | None = None
    """None of one stream, and in records from before it was measured."""


class ModelResult(Measurement):
    """One row of the table: the measurement and what follows from it."""

    loss: Loss
    bits_per_byte: Loss
    minus_backbone: Difference | None
    """None for the backbone."""
    minus_control: Difference | None
    """None for the backbone, the control, and where no control was trained."""
    minus_weights: Difference | None = None
    """To the weights alone on the tokens of both stages; None where these were not trained."""


def paired_difference(a: Sequence[float], b: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Mean of a − b over all predicted tokens, and its standard error over documents.

    The error is that of a ratio of two sums over documents, of losses and of tokens: each
    document's deviation from the mean counts by its share of the tokens (ddof 1). With documents of
    equal length it is their standard deviation over the root of their number.

    Args:
        a: Loss of each document under one model.
        b: Loss of the same documents, in the same order, under the other.
        tokens: Predicted tokens of each document.

    Raises:
        ValueError: Of different lengths, or no document.
    """
    if not len(a) == len(b) == len(tokens) or not a:
        raise ValueError(
            "a paired difference takes the losses of the same documents, one or more, "
            f"under both models; got {len(a)} and {len(b)} of {len(tokens)}"
        )
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Difference(mean=math.nan, standard_error=None)
    mean, n = token_mean(differences, tokens), len(tokens)
    shares = [each * n / sum(tokens) for each in tokens]
    deviations = [w * (x - mean) for w, x in zip(shares, differences, strict=True)]
    error = math.sqrt(math.fsum(x * x for x in deviations) / (n - 1) / n) if n > 1 else None
    return Difference(mean=mean, standard_error=error)


def token_mean(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """The mean of documents' losses in which every predicted token counts the same."""
    return math.fsum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)


def compare(
    documents: Sequence[ScoredDocument], measurements: Sequence[Measurement]
) -> tuple[ModelResult, ...]:
    """Derive every row of the table from the losses of each document.

    A model's loss is the mean over all predicted tokens; bits per byte are those of all documents
    over the bytes of all.

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
        return paired_difference(losses[name], losses[other], tokens)

    rows = []
    for measured in measurements:
        nats = math.fsum(x * n for x, n in zip(measured.losses, tokens, strict=True))
        rows.append(
            ModelResult(
                **{field: getattr(measured, field) for field in Measurement.model_fields},
                loss=token_mean(measured.losses, tokens),
                bits_per_byte=nats / nats_per_bit_of_all,
                minus_backbone=minus(measured.name, BACKBONE),
                minus_control=minus(measured.name, CONTROL),
                minus_weights=minus(measured.name, WEIGHTS if WEIGHTS in losses else LORA),
            )
        )
    return tuple(rows)
