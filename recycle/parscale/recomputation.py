"""Activation checkpointing: what is computed again sees the streams of the first time."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .active import this_thread

FUNCTION = "_gradient_checkpointing_func"  # of transformers, on every module that it recomputes


class _CheckpointWithStreams:
    """A checkpoint function whose recomputation sees the streams of the forward pass.

    On CUDA the recomputation runs in another thread.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = this_thread.forward.active

        def run(*inputs: Any) -> Any:
            state = this_thread.forward
            if state.active == active:  # no recomputation; in a graph nothing may be set
                return function(*inputs)
            previous, state.active = state.active, active
            try:
                return function(*inputs)
            finally:
                state.active = previous

        return self.checkpoint(run, *args, **kwargs)


def is_checkpointed(decoder: PreTrainedModel) -> bool:
    """Whether the decoder's activations are computed again in the backward pass."""
    return decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))


def checkpointable_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that transformers can recompute: one for each layer, mostly."""
    return [module for module in decoder.modules() if hasattr(module, "gradient_checkpointing")]


def carry_streams(modules: Iterable[nn.Module]) -> None:
    """Let the recomputation of these modules see the streams, also where it was set up anew."""
    for module in modules:
        checkpoint = module.__dict__.get(FUNCTION)
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithStreams):
            module.__dict__[FUNCTION] = _CheckpointWithStreams(checkpoint)


def carry_no_streams(modules: Iterable[nn.Module]) -> None:
    """Give these modules back what transformers gave them."""
    for module in modules:
        checkpoint = module.__dict__.get(FUNCTION)
        if isinstance(checkpoint, _CheckpointWithStreams):
            module.__dict__[FUNCTION] = checkpoint.checkpoint
