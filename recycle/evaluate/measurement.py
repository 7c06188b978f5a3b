"""Everything that the table says of each model, measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from recycle import sharding
from recycle.cost.shortage import Change, enough_memory, halved
from recycle.data import Document
from recycle.errors import RecycleError
from recycle.family.adapters import member_state
from recycle.progress import Silent
from recycle.recipe import Evaluation
from recycle.results import Measurement, Speed

from .answers import Question, answers_right
from .diversity import StreamWatch
from .head import OutputHead
from .losses import document_losses
from .passes import Pass, rows_of
from .samples import Samples
from .speed import REPEATS, kv_bytes_per_token, speeds


class EvaluationError(RecycleError):
    """A model cannot be measured."""


def measure(
    model: Any,
    passes: Sequence[Pass],
    documents: Sequence[Document],
    settings: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    progress: Silent,
    parameters: Mapping[str, int] = MappingProxyType({}),
    samples: Samples | None = None,
    at_once: int | None = None,
) -> list[Measurement]:
    """Test losses, streams, speed and sizes of the models that a model can be.

    Args:
        model: A causal LM, or a PEFT model with the adapters of a family.
        passes: Its models, as rows of the table.
        documents: The test documents.
        settings: Batch size, and whether and how speed is measured.
        tokenizer: The backbone's; documents that ask something are answered with it.
        progress: Shows how far it is.
        parameters: Parameters that a row adds to the backbone, where it is not a family's adapter.
        samples: Takes what every row says to its prompts.
        at_once: Streams whose activations are held at once; None is all.

    Raises:
        EvaluationError: A loss is not finite, or memory is too small.
    """
    most = max(active.num_streams if active else 1 for active, _ in passes)
    changes = partial(_changes, model, settings.batch_size, min(at_once or most, most))
    with enough_memory(EvaluationError, "the comparison", changes):
        return _measure(
            model, passes, documents, settings, tokenizer, progress, parameters, samples, at_once
        )


def _changes(model: Any, batch_size: int, at_once: int) -> Iterator[Change]:
    """What takes less memory in a comparison, the best first."""
    if batch_size > 1:
        yield "evaluation.batch_size", halved(batch_size), batch_size
    if at_once > 1:
        yield "stages.streams.at_once", halved(at_once), at_once
    if model.device.type != "cpu":
        yield "launch.device", "cpu", model.device.type
    if getattr(model.config, "quantization_config", None) is None:
        yield "backbone.quantization", "nf4", None


def _measure(
    model: Any,
    passes: Sequence[Pass],
    documents: Sequence[Document],
    settings: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    progress: Silent,
    parameters: Mapping[str, int],
    samples: Samples | None,
    at_once: int | None,
) -> list[Measurement]:
    model.eval()
    rows = rows_of(passes)
    streams = sum(active.num_streams if active else 1 for active, _ in passes)
    progress.start("test loss", streams * sum(len(document.input_ids) for document in documents))
    with OutputHead(model, at_once) as head:
        watch = StreamWatch(head)
        losses = document_losses(watch, passes, documents, settings.batch_size, progress.advance)
    if broken := [name for name, each in losses.items() if not all(map(math.isfinite, each))]:
        raise EvaluationError(
            f"The test loss of {', '.join(broken)} is not finite, with the backbone in "
            f"{str(model.dtype).removeprefix('torch.')}. {range_advice(model)}".rstrip()
        )
    asked = [
        Question(x.prompt_ids, x.answer)
        for x in documents
        if x.prompt_ids is not None and x.answer is not None
    ]
    right: dict[str, list[bool]] = {}
    if asked:
        progress.start("answers", len(rows) * len(asked))
        size = settings.batch_size
        right = answers_right(model, tokenizer, rows, asked, size, advance=progress.advance)
    measured: dict[str, Speed] = {}
    if settings.speed:
        progress.start("speed", len(rows) * (REPEATS + 1))
        lengths = settings.prompt_tokens, settings.new_tokens
        measured = sharding.once(model, lambda: speeds(model, rows, *lengths, progress.advance))
    if samples is not None:
        progress.start("samples")
        sharding.once(model, lambda: samples.take(model, tokenizer, rows))
    kv_bytes = kv_bytes_per_token(model, rows)
    measurements = []
    for name, active in rows.items():
        state = member_state(model, active.adapter, active.num_streams) if active else {}
        added = sum(tensor.numel() for tensor in state.values())
        measurements.append(
            Measurement(
                name=name,
                num_streams=active.num_streams if active else 1,
                losses=tuple(losses[name]),
                adapter_parameters=parameters.get(name, added),
                kv_bytes_per_token=kv_bytes[name],
                right=tuple(right[name]) if asked else None,
                streams=watch.use(active),
                speed=measured.get(name, Speed()),
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
