"""Expected time and memory of a run, from a pass of each kind with the model itself.

Dimensions: B blocks, S tokens of a block, |P| values of P at once.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModelForCausalLM
from torch import Tensor

from recycle.parscale import ActiveStreams

LogProbs = Callable[[ActiveStreams | None, Tensor, Tensor], Tensor]
"""Streams, `input_ids` and `labels` `[B, S]` to log-probabilities `[|P|, B, S - 1]`."""
WARM_UP = 32  # tokens
CPU_TOKENS = 128  # of a measured pass: enough to tell, and seconds where a CPU is slow


@dataclass(frozen=True)
class Work:
    """What is still to be done with one adapter, in text tokens."""

    active: ActiveStreams
    learned: int
    """Tokens to learn from."""
    read: int
    """Tokens of validation and test."""


@dataclass(frozen=True)
class Estimate:
    """What a run is going to take."""

    seconds: float
    gib: float


def estimate_run(
    model: PeftModelForCausalLM,
    log_probs: LogProbs,
    work: Sequence[Work],
    *,
    backbone_read: int,
    block_size: int,
    micro_batch_size: int,
    gradient_checkpointing: bool,
) -> Estimate:
    """Expected time and memory of the rest of a run, from short passes with its first adapter.

    Args:
        model: The backbone with the adapter of the first piece of work, which has the most streams.
        log_probs: How losses are computed in the run.
        work: What is to be done with each adapter.
        backbone_read: Test tokens that the backbone reads alone.
        block_size: Tokens of a block.
        micro_batch_size: Blocks in a forward and backward pass.
        gradient_checkpointing: Activations are computed twice in training.
    """
    device = model.device
    active = work[0].active
    length = block_size if device.type == "cuda" else min(block_size, CPU_TOKENS)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(length, device=device) % vocabulary).unsqueeze(0)
    before = _memory(device)

    def seconds(streams: ActiveStreams | None, tokens: Tensor, backward: bool = False) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            total = log_probs(streams, tokens, tokens).sum()
        total.backward() if backward else None
        total.item()  # waits for the GPU
        return time.perf_counter() - started

    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    seconds(active, ids[:, :WARM_UP], backward=True)  # sets kernels up
    learning = seconds(active, ids, backward=True)
    model.zero_grad(set_to_none=True)
    model.eval()
    reading, reading_alone = seconds(active, ids), seconds(None, ids)
    # The cost of one stream between those of the adapter and of the backbone alone, the control.
    each = max(active.num_streams - 1, 1)
    share = {p: (p - 1) / each for p in range(1, active.num_streams + 1)}
    total = backbone_read * reading_alone
    for piece in work:
        part = share[piece.active.num_streams]
        read = reading_alone + part * (reading - reading_alone)
        total += piece.read * read + piece.learned * read * learning / reading
    adapter = sum(x.numel() for x in model.parameters() if x.requires_grad)
    growth = (_memory(device) - before) * micro_batch_size * block_size / length
    return Estimate(
        seconds=total / length,
        gib=(before + growth + 3 * 4 * adapter) / 2**30,  # gradient and AdamW's two moments
    )


def _memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
