"""What inference takes for each P, estimated from the model's shape: what `recycle plan` prints."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from .record import Record


class Estimate(Record):
    """One P."""

    p: PositiveInt
    """1 is the model without streams."""
    adapter_parameters: NonNegativeInt
    """Of the streams: prefixes and aggregator."""
    weights_gib: NonNegativeFloat
    kv_cache_gib: NonNegativeFloat
    activations_gib: NonNegativeFloat
    memory_gib: NonNegativeFloat
    """The sum of these three."""
    prefill_s: NonNegativeFloat
    token_s: NonNegativeFloat
    """A step of decoding, the mean of a request's."""
    latency_s: NonNegativeFloat
    """A whole request: prefill, and all tokens that are generated."""


class Estimates(Record):
    """Requests of one kind on one GPU."""

    gpu: str
    """Its name in the data file of `recycle.cost`."""
    dtype: str
    batch: PositiveInt
    input_tokens: PositiveInt
    output_tokens: PositiveInt
    estimates: tuple[Estimate, ...]
    """In rising order of P."""
