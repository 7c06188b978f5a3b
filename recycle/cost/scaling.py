"""What a larger model costs that the scaling law puts level with P streams."""

from dataclasses import replace

from recycle.law import PAPER
from recycle.results.record import Record

from .gpu import Gpu, find_gpu
from .inference import Numbers, Request, estimate
from .shape import Shape

LAW = "stack-v2-python"
# The paper's example: 1.6B parameters and 8 streams, batch 1, on an A100-80GB.
HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 1536, 8320, 36, 16, 2, 151936
PAPER_P, PAPER_MEMORY, PAPER_LATENCY = 8, 22.0, 6.0
# Its Figure 4 is a mean over inputs and outputs of these lengths, and its larger model is read off
# between measured losses: 8 streams reach 1.0383, models of 2.775B and 4.353B 1.0451 and 1.0213.
PAPER_LENGTHS, PAPER_EQUAL = (64, 128, 256, 512), 3.226e9


class Scaling(Record):
    """P streams, and one stream of a larger model with the same predicted loss."""

    p: int
    parameters: int
    """Outside the embeddings, of the larger model."""
    streams_memory_gib: float
    """Increase over the model as it is."""
    streams_latency_s: float
    scaled_memory_gib: float
    scaled_latency_s: float
    memory_ratio: float
    """Increase by parameters over increase by streams."""
    latency_ratio: float


class PaperExample(Record):
    """The paper's example, computed here."""

    memory_ratio: float
    """With the law, inputs and outputs of 64 tokens."""
    latency_ratio: float
    averaged_memory_ratio: float
    """As the paper has it: over its lengths, to the model that its measured losses give."""
    averaged_latency_ratio: float
    paper_memory_ratio: float = PAPER_MEMORY
    paper_latency_ratio: float = PAPER_LATENCY


def scale(
    shape: Shape,
    gpu: Gpu,
    p: int,
    requests: tuple[Request, ...],
    numbers: Numbers,
    prefix: int = 48,
    equal: float | None = None,
) -> Scaling:
    """Set P streams beside a wider model; layers stay as they are.

    Args:
        shape: The model's.
        gpu: Where both run.
        p: Streams, at least 2.
        requests: What is asked; increases are their mean.
        numbers: What both compute in.
        prefix: Learned tokens of each stream.
        equal: Parameters outside the embeddings of the wider model; None asks the law.
    """
    equal = equal or PAPER[LAW].equal_parameters(shape.non_embedding, p)
    kinds = ((shape, 1), (shape, p), (shape.widened(equal), 1))
    memory, latency = [], []
    for each, streams in kinds:
        found = [estimate(each, gpu, streams, x, numbers, prefix) for x in requests]
        memory.append(sum(x.memory_gib for x in found) / len(requests))
        latency.append(sum(x.latency_s for x in found) / len(requests))
    (streams_memory, scaled_memory), (streams_latency, scaled_latency) = (
        (more - base, most - base) for base, more, most in (memory, latency)
    )
    return Scaling(
        p=p,
        parameters=round(equal),
        streams_memory_gib=streams_memory,
        streams_latency_s=streams_latency,
        scaled_memory_gib=scaled_memory,
        scaled_latency_s=scaled_latency,
        memory_ratio=scaled_memory / streams_memory,
        latency_ratio=scaled_latency / streams_latency,
    )


def paper_example() -> PaperExample:
    """The increases of the paper's example, and why they are not just 22 and 6."""
    attention = 2 * HIDDEN**2 * (1 + KEY_HEADS / HEADS) * LAYERS
    mlp = 3.0 * HIDDEN * INNER * LAYERS
    shape = Shape(
        layers=LAYERS,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        heads=HEADS,
        attention=attention,
        mlp=mlp,
        experts=0,
        active_mlp=mlp,
        vectors=HIDDEN * (2 * LAYERS + 1),
        embedding=VOCABULARY * HIDDEN,
        head=0,
        others=0,
        inner=INNER,
        scores=2 * HIDDEN * LAYERS,
        keys_values=2 * HIDDEN * KEY_HEADS / HEADS * LAYERS,
    )
    gpu, numbers = find_gpu("a100-80gb"), Numbers()
    own = scale(shape, gpu, PAPER_P, (Request(),), numbers)
    requests = tuple(replace(Request(), input_tokens=n, output_tokens=n) for n in PAPER_LENGTHS)
    mean = scale(shape, gpu, PAPER_P, requests, numbers, equal=PAPER_EQUAL)
    return PaperExample(
        memory_ratio=own.memory_ratio,
        latency_ratio=own.latency_ratio,
        averaged_memory_ratio=mean.memory_ratio,
        averaged_latency_ratio=mean.latency_ratio,
    )
