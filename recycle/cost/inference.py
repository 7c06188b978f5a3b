"""Memory and latency of inference with each P: the method of upstream's `cost_analysis.py`.

That is llm-analysis' model of one GPU (github.com/cli99/llm-analysis) with streams as more rows of
a batch, and prefixes as more tokens of a text. A matrix takes the longer of computing and of moving
its weights and activations, at 0.7 of the GPU's FLOP/s and 0.9 of its bandwidth; the parts of a
layer follow one another.

It is kept to the letter, to within a thousandth for the shapes that upstream estimates; elsewhere
what is counted on the model's modules takes the place of what it derives from a few sizes (experts,
heads of their own size, latent attention). In three things it is no count of what our code does:

- The embedding is held once, also where the output head has a matrix of its own. `recycle plan`
  says how much that adds. A pass reads one of the two either way, so latency has it right.
- The first 48 positions, of the prefixes, go through the output head with every stream.
- A prefix lies in every text's cache; ours is held once, as a parameter.

Latencies are what the GPU allows. Of the shape of Qwen2.5-3B with P = 8 an H100 took 5.3 ms a token
compiled and 44 ms eager, where this says 2.2.

Dimensions: B texts of a batch, P streams, S positions of a pass, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

from recycle.results import Estimate

from .gpu import Gpu
from .shape import Shape

COMPUTING, MOVING = 0.7, 0.9  # share of the GPU's FLOP/s and GB/s that is reached
NORM_BYTES = 4  # norms work in float32
# Bytes of a quantised weight: nf4 in blocks of 64 whose scales are quantised again.
QUANTISED = {"int8": 1.0, "nf4": 0.516}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Request:
    """What is asked of a model at once."""

    batch: int = 1
    """B."""
    input_tokens: int = 64
    """Of each text."""
    output_tokens: int = 64


@dataclass(frozen=True)
class Numbers:
    """What weights and activations are in."""

    dtype: str = "bfloat16"
    quantization: str | None = None
    """Of the decoder's `nn.Linear`: bitsandbytes leaves stacks of experts as they are."""

    @property
    def bytes(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def matrix_bytes(self) -> float:
        """Of a weight in one of the decoder's matrices."""
        return self.bytes if self.quantization is None else QUANTISED[self.quantization]


def estimate(
    shape: Shape, gpu: Gpu, p: int, request: Request, numbers: Numbers, prefix: int = 48
) -> Estimate:
    """What a request takes with P streams.

    Args:
        shape: The model's.
        gpu: Where it runs.
        p: Streams; 1 is the model without them.
        request: What is asked.
        numbers: What it computes in.
        prefix: Learned tokens of each stream.
    """
    size, rate, bandwidth = (
        numbers.bytes,
        COMPUTING * gpu.flops(numbers.dtype),
        MOVING * 1e9 * gpu.bandwidth,
    )
    prefix *= p > 1
    batch, rows, d = request.batch, request.batch * p, shape.hidden
    inputs, outputs = request.input_tokens, request.output_tokens
    mixed = max(3 * d, 2 * d + 4 * shape.heads)  # numbers that attention holds of a position
    inner = max(d, shape.inner)

    stacked = shape.experts / shape.mlp
    mlp_bytes = stacked * size + (1 - stacked) * numbers.matrix_bytes

    def attention(b: int, s: int) -> float:
        """Seconds, in all layers."""
        computing = b * s * 2 * (shape.attention + s * shape.scores)
        moving = shape.attention * numbers.matrix_bytes + shape.layers * b * s * mixed * size
        return max(computing / rate, moving / bandwidth)

    def mlp(b: int, s: int) -> float:
        """Seconds, in all layers; of experts, those that the positions can be sent to."""
        touched = min(shape.mlp, b * s * shape.active_mlp)
        moving = touched * mlp_bytes + shape.layers * b * s * inner * size
        return max(b * s * 2 * shape.active_mlp / rate, moving / bandwidth)

    def layers(b: int, s: int) -> float:
        norms = 2 * shape.layers * b * s * d
        norm = norms * max(5 / rate, NORM_BYTES / bandwidth)
        return attention(b, s) + mlp(b, s) + norm

    table = shape.vocabulary * d  # the embedding, read once in a pass
    head = 2 * table / rate  # seconds for a position

    aggregator = (d + 1) * d * p * (p > 1)
    aggregating = aggregator / shape.mlp * mlp(batch, inputs + outputs)
    cache = rows * (inputs + prefix + outputs) * shape.keys_values * size
    first = layers(rows, inputs + prefix) + table * size / bandwidth
    first += (batch * inputs + rows * prefix) * head
    # A step reads the cache and writes it, at its full length.
    step = layers(rows, 1) + (table * size + 2 * cache) / bandwidth + batch * head
    share = inputs / (inputs + outputs)  # of the aggregator's work that is the prompt's

    matrices = shape.attention * numbers.matrix_bytes + shape.mlp * mlp_bytes
    weights = matrices + (shape.vectors + shape.others + shape.embedding + aggregator) * size
    held = max(rows * max(mixed, inner), batch * shape.vocabulary) * (inputs + prefix) * size
    prefill, token = first + share * aggregating, step + (1 - share) * aggregating / outputs
    return Estimate(
        p=p,
        adapter_parameters=shape.adapter_parameters((p,), prefix) if p > 1 else 0,
        weights_gib=weights / 2**30,
        kv_cache_gib=cache / 2**30,
        activations_gib=held / 2**30,
        memory_gib=(weights + cache + held) / 2**30,
        prefill_s=prefill,
        token_s=token,
        latency_s=prefill + outputs * token,
    )
