"""Streams of one block in groups, one after the other, where all at once do not fit.

Streams do not meet before the aggregator. So some of them can run, then the next ones, and only
their final hidden states have to be there together. In training each group's pass is computed again
in the backward pass: one group's activations at a time are held, for one more forward pass in all.

Dimensions: B batch, P streams, G streams of a group, S sequence, D hidden size, |P| values of P.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .active import ActiveStreams, choose
from .aggregator import merge
from .streams import streams_of


def run_in_groups(
    model: nn.Module,
    active: ActiveStreams,
    at_once: int,
    decode: Callable[[dict[str, Any]], Tensor],
    inputs: dict[str, Any],
) -> Tensor:
    """Final hidden states `[|P|*B, S, D]`, as one pass of the decoder gives them.

    Args:
        model: A model with ParScale adapters.
        active: The streams to run.
        at_once: Streams of a group; the last one may have fewer.
        decode: Runs the decoder with the streams that are chosen, and returns what it gives.
        inputs: What `decode` is called with: tensors whose first dimension is B.
    """
    streams = streams_of(model)

    def run(first: int, inputs: dict[str, Any]) -> Tensor:
        size = min(at_once, active.num_streams - first)
        group = ActiveStreams(active.adapter, size, (), apart=True, first=active.first + first)
        with choose(streams.selection, group):  # here, as a recomputation has a thread of its own
            return decode(inputs)  # [G*B, S, D], the first stream first

    starts = range(0, active.num_streams, at_once)
    if torch.is_grad_enabled():
        groups = [checkpoint(run, first, inputs, use_reentrant=False) for first in starts]
    else:
        groups = [run(first, inputs) for first in starts]
    hidden = torch.cat(groups).unflatten(0, (active.num_streams, -1))  # [P, B, S, D]
    return merge(streams.parscale_aggregator[active.adapter], hidden.transpose(0, 1), active)
