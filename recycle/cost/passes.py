"""Expected time and memory of passes, from a short pass of each kind with the model itself.

Dimensions: B blocks, S tokens of a block, |P| values of P at once.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recycle.parscale import ActiveStreams, checkpointing_arguments
from recycle.recipe.kinds import Checkpointing
from recycle.sharding import is_sharded

from .pricing import PassCost
from .shortage import is_out_of_memory

LogProbs = Callable[[ActiveStreams | None, Tensor, Tensor], Tensor]
"""Streams, `input_ids` and `labels` `[B, S]` to log-probabilities `[|P|, B, S - 1]`."""
WARM_UP = 32  # tokens
_earlier = [0]  # bytes, before the GPU's allocator last began to count anew
# Of a measured pass: enough to tell, seconds where a CPU is slow, and little memory where a GPU has
# a part of a model.
SHORT = 128


def pass_cost(
    model: Any,
    log_probs: LogProbs,
    active: ActiveStreams | None,
    *,
    block_size: int,
    micro_batch_size: int,
    gradient_checkpointing: Checkpointing,
) -> PassCost:
    """Measure short passes of a model, with what learns in it as it is.

    Args:
        model: The model, some parameters of which require gradients, or none.
        log_probs: How losses are computed in the run.
        active: The streams to run.
        block_size: Tokens of a block.
        micro_batch_size: Blocks in a forward and backward pass.
        gradient_checkpointing: Activations are computed twice in training, or some of them.
    """
    device, sharded = model.device, is_sharded(model)
    short = sharded or device.type != "cuda"
    length = min(block_size, SHORT) if short else block_size
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(length, device=device) % vocabulary).unsqueeze(0)
    before = peak_memory(device)

    def seconds(tokens: Tensor, backward: bool = False) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            total = log_probs(active, tokens, tokens).sum()
        total.backward() if backward else None
        total.item()  # waits for the GPU
        return time.perf_counter() - started

    learned = sum(x.numel() for x in model.parameters() if x.requires_grad)
    learns = learned > 0
    if learns and gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpointing_arguments(gradient_checkpointing))
    model.train(learns)
    seconds(ids[:, :WARM_UP], backward=learns)  # sets kernels up
    while True:
        try:
            learning = seconds(ids, backward=learns)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or length <= WARM_UP or sharded:
                raise  # of a sharded model: the others wait in the middle of a layer
        length //= 2  # fewer tokens tell it too
        ids = ids[:, :length]
    model.zero_grad(set_to_none=True)
    if learns and gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    reading = seconds(ids)
    growth = (peak_memory(device) - before) * micro_batch_size * block_size / length
    gib = (before + growth + 3 * 4 * learned) / 2**30  # gradient and AdamW's two moments
    return PassCost(learning / length, reading / length, gib)


def count_anew(device: torch.device) -> None:
    """Let a GPU's allocator count its peak from now on; `peak_memory` remembers the one so far."""
    _earlier[0] = peak_memory(device)
    torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return max(_earlier[0], torch.cuda.max_memory_allocated(device))
    if device.type == "mps":  # which keeps what was allocated, so that this is nearly the peak
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
