"""Everything that the table says of each model, measured."""

import math
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModelForCausalLM
from torch import nn

from recycle.data import Document
from recycle.errors import RecycleError
from recycle.family.adapters import member_state
from recycle.progress import Silent
from recycle.recipe import Evaluation
from recycle.results import Measurement, Speed

from .head import OutputHead
from .losses import document_losses
from .passes import passes_of, rows_of
from .speed import REPEATS, kv_bytes_per_token, speeds


class EvaluationError(RecycleError):
    """A model cannot be measured."""


def measure(
    model: PeftModelForCausalLM,
    documents: Sequence[Document],
    settings: Evaluation,
    trained_at: Mapping[str, float | None],
    progress: Silent,
) -> list[Measurement]:
    """Test losses, speed and sizes of the backbone, the control and each P, as in the table.

    Args:
        model: A PEFT model with the adapters of a family.
        documents: The test documents.
        settings: Batch size, and whether and how speed is measured.
        trained_at: Text tokens per second in the training of each adapter, by its name.
        progress: Shows how far it is.

    Raises:
        EvaluationError: A loss is not finite.
    """
    model.eval()
    passes = passes_of(model)
    rows = rows_of(passes)
    streams = sum(active.num_streams if active else 1 for active, _ in passes)
    progress.start("test loss", streams * sum(len(document.input_ids) for document in documents))
    with OutputHead(model) as head:
        losses = document_losses(head, passes, documents, settings.batch_size, progress.advance)
    if broken := [name for name, each in losses.items() if not all(map(math.isfinite, each))]:
        raise EvaluationError(
            f"The test loss of {', '.join(broken)} is not finite, with the backbone in "
            f"{str(model.dtype).removeprefix('torch.')}. {range_advice(model)}".rstrip()
        )
    measured: dict[str, Speed] = {}
    if settings.speed:
        progress.start("speed", len(rows) * (REPEATS + 1))
        lengths = settings.prompt_tokens, settings.new_tokens
        measured = speeds(model, rows, *lengths, progress.advance)
    kv_bytes = kv_bytes_per_token(model, rows)
    measurements = []
    for name, active in rows.items():
        speed = {"train_tokens_per_second": trained_at.get(active.adapter) if active else None}
        state = member_state(model, active.adapter, active.num_streams) if active else {}
        measurements.append(
            Measurement(
                name=name,
                num_streams=active.num_streams if active else 1,
                losses=tuple(losses[name]),
                adapter_parameters=sum(tensor.numel() for tensor in state.values()),
                kv_bytes_per_token=kv_bytes[name],
                speed=measured.get(name, Speed()).model_copy(update=speed),
            )
        )
    return measurements


def range_advice(model: nn.Module) -> str:
    """What to do about a loss that is not finite where the backbone's number format may be why."""
    if model.dtype != torch.float16:
        return ""
    return (
        "float16 ends at 65,504, which the hidden states of some models exceed: set "
        "backbone.dtype=bfloat16 or backbone.dtype=float32. "
    )
