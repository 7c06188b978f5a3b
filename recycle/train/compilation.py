"""Compiled layers: the decoder's layers in training, each compiled by itself.

Layers that are built alike share their code, so a model compiles in the time of two or three of
them. Validation stays as it is: its texts have too many lengths.
"""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.modeling_layers import GradientCheckpointingLayer

from recycle.parscale import find_decoder

from .checkpoints import TrainingError

CODES = 64  # versions of a layer: of other kinds, with and without a gradient of their input


class CompiledLayers:
    """A context manager in which the layers of a model's decoder run compiled.

    Prefixes, LoRAs and hooks of a layer are compiled with it. So is its checkpointing, where
    transformers has that in `forward` (from 5.23 on); before, it runs around the compiled layer.

    Args:
        model: A causal LM, or a PEFT model of one.
        options: Of `torch.compile`. Shapes are constants as long as they stay the same.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.calls = {
            layer: torch.compile(layer._call_impl, **options)
            for layer in find_decoder(model).modules()
            if isinstance(layer, GradientCheckpointingLayer)
        }
        if not self.calls:
            raise TrainingError(
                f"training.compile=true compiles the layers of a decoder, and transformers marks "
                f"none in {type(find_decoder(model)).__name__}. Set training.compile=false."
            )

    def __enter__(self) -> None:
        self.limit = torch._dynamo.config.patch(recompile_limit=CODES)
        self.limit.__enter__()
        for layer, call in self.calls.items():
            layer._compiled_call_impl = call

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self.calls:
            layer._compiled_call_impl = None
        self.limit.__exit__(kind, error, trace)
        if isinstance(error, BackendCompilerFailed):
            raise TrainingError(
                "training.compile=true, and the layers cannot be compiled here, which takes a C++ "
                f"compiler on a CPU and Triton on a GPU: {str(error).splitlines()[0]} "
                "Set training.compile=false."
            ) from error

    def release(self) -> None:
        """Let go of all compiled code: another training has other shapes."""
        self.calls.clear()
        torch.compiler.reset()
