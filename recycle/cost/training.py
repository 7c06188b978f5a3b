"""Operations, time and memory of a training, computed from the model's shape.

Operations of a text token: each stream passes it through N active parameters, 2 N forward and 2 N
back to what learns below; the weights' own gradients, 2 N more, are computed where they learn
(`PassCost.with_all_weights`). So a token costs 4 N P with streams on frozen weights, 6 N where all
weights learn, and 2 N P more with gradient checkpointing. Attention, aggregators, LoRA and one pass
of the output head for each P come on top.

Dimensions: B blocks of a micro-batch, S tokens of a block, P streams, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from recycle.recipe.kinds import Checkpointing

from .gpu import Gpu
from .inference import Numbers
from .pricing import PassCost
from .shape import Shape

# A step takes the time of its operations, at half of the GPU's FLOP/s, and that of moving what
# layers keep for the backward pass, which goes through memory so often in a forward and a backward
# pass. Fitted to a model of 135M on one H100: with 8 nested streams 22k tokens/s were measured and
# 21k come out, with one 113k and 163k, with a LoRA 62k and 94k. Larger models were not measured.
COMPUTING, CROSSINGS = 0.5, 25
# A small micro-batch waits for Python: a layer's forward pass took 0.9 ms there, whatever its size,
# and a backward pass takes as long again.
LAYER_SECONDS = 0.9e-3
USABLE = 0.9  # of a GPU's memory; the rest is the driver's, and lost between tensors
# Numbers that a layer keeps of a position for the backward pass, by width: counted on Llama, Qwen2
# and Qwen3 layers, from which this is at most a quarter away.
KEPT_HIDDEN, KEPT_INNER = 10, 3.25
# The same in float32, of matrices that learn or have a LoRA: their inputs.
INPUTS_HIDDEN, INPUTS_INNER = 6, 1
# The same of products and attention, which selective checkpointing keeps.
SELECTED_HIDDEN, SELECTED_INNER = 4.75, 2
LOGITS = 2**24  # that the output head holds at once, see `recycle.evaluate.head`


@dataclass(frozen=True)
class Learner:
    """What learns on a model, and on what."""

    p_values: tuple[int, ...]
    """(1,) where there is one stream or none."""
    learned: int
    """Parameters of the streams, or of a LoRA."""
    in_weights: bool
    """Whether a LoRA or the weights learn, and not streams on frozen ones."""
    block_size: int
    """S."""
    prefix: int
    """Learned tokens of each stream; 0 without streams."""
    apart: bool = False
    """Whether each stream alone has a loss as well."""
    at_once: int | None = None
    """Streams whose activations are held at once; None is all."""
    shards: int = 1
    """Processes that each hold a part of every layer."""

    @property
    def streams_held(self) -> int:
        return min(self.at_once or self.p_values[-1], self.p_values[-1])

    @property
    def outputs(self) -> int:
        """Passes of the output head for a text token."""
        return len(self.p_values) + self.apart * self.p_values[-1]


def operations(
    shape: Shape, learner: Learner, checkpointing: Checkpointing = False
) -> tuple[float, float]:
    """Floating-point operations of a text token: in learning, with frozen weights, and in reading.

    Args:
        shape: The model's.
        learner: What learns.
        checkpointing: Activations are computed twice; selectively, none of what is counted here.
    """
    streams = learner.p_values[-1]
    matrices = 2 * (shape.attention + shape.active_mlp)
    scores = 2 * (learner.block_size + learner.prefix) * shape.scores
    head = 2 * shape.vocabulary * shape.hidden * learner.outputs
    aggregators = 2 * sum(p * shape.hidden**2 for p in learner.p_values if p > 1)
    own = 2 * learner.learned if learner.in_weights else aggregators  # of a LoRA
    reading = streams * (matrices + scores) + head + own
    backward = streams * (matrices + 2 * scores) + head + 2 * own
    again = (checkpointing is True) + (learner.streams_held < streams)  # groups of streams: once
    return reading * (1 + again) + backward, reading


def memory(
    shape: Shape,
    numbers: Numbers,
    learner: Learner,
    micro_batch_size: int,
    checkpointing: Checkpointing = False,
) -> float:
    """GiB of a training on frozen weights.

    These are the weights (of layers that are shared out, a part, and two whole ones: that which
    runs, and the next), what learns in float32 with a gradient and AdamW's two moments, what
    every layer keeps for the backward pass (with checkpointing: its input, the results of products
    where that is selective, and all of one layer), and a part of the logits with their gradient.
    """
    positions = micro_batch_size * learner.block_size * learner.streams_held
    kept = _kept(shape, learner, numbers)
    layers = shape.layers * kept
    if checkpointing:
        width = shape.hidden
        if checkpointing == "selective":
            width += SELECTED_HIDDEN * shape.hidden + SELECTED_INNER * shape.inner
        layers = shape.layers * width * numbers.bytes + kept
    matrices = shape.attention + shape.mlp - shape.experts  # that quantising takes
    layers_held = min(1 / learner.shards + 2 / shape.layers, 1) if learner.shards > 1 else 1
    weights = layers_held * (matrices * numbers.matrix_bytes + shape.experts * numbers.bytes)
    weights += (shape.parameters - matrices - shape.experts) * numbers.bytes
    held = weights + 16 * learner.learned + positions * layers
    return held / 2**30 + logits_gib(micro_batch_size * learner.block_size, shape.vocabulary)


def logits_gib(positions: int, vocabulary: int) -> float:
    """Memory of a tile of one P's logits, what the softmax makes of them, and their gradient."""
    return 3 * 4 * min(positions * vocabulary, LOGITS) / 2**30


def _kept(shape: Shape, learner: Learner, numbers: Numbers) -> float:
    """Bytes that a layer keeps of a position for the backward pass."""
    kept = (KEPT_HIDDEN * shape.hidden + KEPT_INNER * shape.inner) * numbers.bytes
    if learner.in_weights:
        kept += (INPUTS_HIDDEN * shape.hidden + INPUTS_INNER * shape.inner) * 4
    return kept


def training_cost(
    shape: Shape,
    numbers: Numbers,
    gpu: Gpu,
    learner: Learner,
    micro_batch_size: int,
    checkpointing: Checkpointing,
) -> PassCost:
    """What a text token takes on a GPU, with frozen weights."""
    operated = operations(shape, learner, checkpointing)
    moved = learner.p_values[-1] * shape.layers * CROSSINGS * _kept(shape, learner, numbers)
    waited = shape.layers * LAYER_SECONDS / (micro_batch_size * learner.block_size)
    passes = 3 + (checkpointing is True)  # a backward pass is two forward ones
    learning, reading = (
        max(
            each / (COMPUTING * gpu.flops(numbers.dtype)) + moved * share / (1e9 * gpu.bandwidth),
            waited * launched,
        )
        for each, share, launched in zip(
            operated, (passes / 3, 1 / 3), (2 + bool(checkpointing), 1), strict=True
        )
    )
    gib = memory(shape, numbers, learner, micro_batch_size, checkpointing)
    return PassCost(learning, reading, gib)


def largest_micro_batch(
    shape: Shape,
    numbers: Numbers,
    gpu: Gpu,
    learner: Learner,
    batch_size: int,
    checkpointing: Checkpointing,
    more_gib: float = 0.0,
) -> int | None:
    """The largest power of two that divides a batch and fits; None where one block does not.

    Args:
        more_gib: Taken besides, by weights that learn.
    """
    largest, size = None, 1
    while batch_size % size == 0:
        gib = memory(shape, numbers, learner, size, checkpointing) + more_gib
        if gib > USABLE * gpu.memory_gib:
            break
        largest, size = size, 2 * size
    return largest


def lora_parameters(model: Any, rank: int, targets: tuple[str, ...]) -> int:
    """Parameters of a LoRA on a model or a skeleton.

    Args:
        model: A causal LM.
        rank: Of the LoRA.
        targets: Ends of modules' names; `all-linear` is all matrices but the output head.
    """
    head, found = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        named = any(name == x or name.endswith(f".{x}") for x in targets)
        everywhere = targets == ("all-linear",) and module is not head
        if isinstance(module, nn.Linear | Conv1D) and (named or everywhere):
            found += rank * sum(module.weight.shape)
    return found
