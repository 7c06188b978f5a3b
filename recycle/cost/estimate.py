"""Expected time and memory of a run, before it starts."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch.nn import functional as F

from recycle.parscale.initialise import streams_of
from recycle.parscale.prefix import ActiveStreams
from recycle.parscale.streams import choose_streams
from recycle.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """What a run is going to take."""

    seconds: float
    gib: float
    tokens: dict[str, int]  # of text, that each adapter still learns from


def estimate(
    model: PeftModelForCausalLM, recipe: Recipe, jobs: Sequence[Any], steps_left: dict[str, int]
) -> Estimate:
    """Expected time and memory of the rest of a run, from short steps with its first adapter.

    Args:
        model: The backbone with the first job's adapter.
        recipe: The run's.
        jobs: Its trainings.
        steps_left: Optimiser steps that each job still has to do, by its adapter's name.
    """
    layer = streams_of(model)
    job = jobs[0]
    p = job.p_values[-1]
    device = next(model.parameters()).device
    block = recipe.data.block_size
    length = min(block, 128)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = (torch.arange(length, device=device) % vocabulary).unsqueeze(0)
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    before = _memory(device)

    def seconds_per_stream_token(backward: bool) -> float:
        started = time.perf_counter()
        with choose_streams(layer, ActiveStreams(job.adapter, p, job.p_values)):
            labels = tokens.repeat(len(job.p_values), 1)
            with torch.set_grad_enabled(backward):
                loss = F.cross_entropy(
                    model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float(),
                    labels.flatten(),
                )
            loss.backward() if backward else loss.item()
        return (time.perf_counter() - started) / (length * p)

    seconds_per_stream_token(True)  # the first pass also sets kernels up
    learning = min(seconds_per_stream_token(True) for _ in range(2))
    reading = min(seconds_per_stream_token(False) for _ in range(2))
    model.zero_grad(set_to_none=True)
    model.eval()

    training, data = recipe.training, recipe.data
    all_streams = sum(job.p_values[-1] for job in jobs)
    text: dict[str, int] = {}
    learned = 0  # stream-tokens
    read = block * (all_streams + 1) * data.test_documents
    for each in jobs:
        left, streams = steps_left[each.adapter], each.p_values[-1]
        points = left // training.validation_steps + (2 if left else 0)
        text[each.adapter] = left * training.batch_size * block
        learned += text[each.adapter] * streams
        read += points * data.validation_documents * block * streams
    adapter = sum(x.numel() for x in model.parameters() if x.requires_grad)
    micro_batches = training.micro_batch_size * block / length
    logits = recipe.evaluation.batch_size * len(job.p_values) * block * vocabulary
    growth = max((_memory(device) - before) * micro_batches, logits * model.dtype.itemsize)
    return Estimate(
        seconds=learned * learning + read * reading,
        gib=(before + growth + 3 * 4 * adapter) / 2**30,  # gradient and AdamW's two moments
        tokens=text,
    )


def _memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
