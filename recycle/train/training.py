"""One training, from the adapter that it starts from to its record."""

import shutil
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from peft import PeftModelForCausalLM, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from recycle.data import Document
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead
from recycle.family.adapters import adapter_state
from recycle.parscale import ParScaleConfig
from recycle.progress import Silent
from recycle.recipe import Method
from recycle.results import TrainingRecord

from .checkpoints import RECORD, is_complete, last_checkpoint, seal, writing
from .plan import TrainingPlan
from .trainer import StreamTrainer, first_record

FINISHED = "finished"  # folder of a finished training: its seal makes it one
WEIGHTS = "trained.safetensors"


def add_adapter(
    model: Any,
    plan: TrainingPlan,
    method: Method,
    starts: Tensor,
    quantization: str | None,
) -> PeftModelForCausalLM:
    """Add a training's untrained adapter to a backbone, or the PEFT model it became, and use it.

    Args:
        model: The backbone, or what an earlier call returned.
        plan: The training's.
        method: How streams are made.
        starts: `[streams, n]` token ids of the texts that streams start from; a training takes the
            first of them.
        quantization: What the backbone's weights are in, for the record.
    """
    torch.manual_seed(plan.settings.seed)
    text = method.init == "text"
    config = ParScaleConfig(
        num_streams=plan.num_streams,
        p_values=list(plan.p_values),
        num_virtual_tokens=method.num_virtual_tokens,
        smoothing=method.smoothing,
        init=method.init,
        start_token_ids=starts[: plan.num_streams].tolist() if text else None,
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        backbone_quantization=quantization,
    )
    if isinstance(model, PeftModelForCausalLM):
        model.add_adapter(plan.adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=plan.adapter)
    model.set_adapter(plan.adapter)
    return model


def train(
    model: PeftModelForCausalLM,
    plan: TrainingPlan,
    blocks: datasets.Dataset,
    validation: Sequence[Document],
    batch_size: int,
    progress: Silent,
) -> TrainingRecord:
    """Train one adapter, going on from its last good checkpoint.

    Args:
        model: The PEFT model with the adapter, as it starts.
        plan: What to do.
        blocks: Rows of `input_ids` and `labels`, as many as the steps need.
        validation: Documents for the validation loss.
        batch_size: Documents in a pass of validation.
        progress: Shows how far it is.

    Returns:
        The record of the training. The adapter in `model` holds the trained values, also where an
        earlier call had finished the training already.

    Raises:
        TrainingError: A loss or a prefix's gradient is missing or not finite, or a checkpoint
            cannot be written.
    """
    finished = plan.folder / FINISHED
    if is_complete(finished):
        set_peft_model_state_dict(model, load_file(finished / WEIGHTS), adapter_name=plan.adapter)
        return TrainingRecord.model_validate_json((finished / RECORD).read_text())
    record = first_record(plan)
    if plan.steps:
        checkpoint = last_checkpoint(plan.folder)
        use_cache = model.config.use_cache
        with OutputHead(model) as head:
            trainer = StreamTrainer(model, plan, blocks, validation, batch_size, head, progress)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                trainer.release()
                model.config.use_cache = use_cache  # which the trainer switches off
        record = trainer.record
    shutil.rmtree(finished, ignore_errors=True)  # of a process that was killed
    with writing(finished):
        finished.mkdir(parents=True)
        state = adapter_state(model, plan.adapter)
        save_file({k: x.contiguous() for k, x in state.items()}, finished / WEIGHTS)
        write_atomically(finished / RECORD, record.model_dump_json().encode())
        seal(finished)
    for unneeded in plan.folder.glob("checkpoint-*"):  # only now: up to the seal they are needed
        shutil.rmtree(unneeded)
    return record


def steps_done(plan: TrainingPlan) -> int:
    """Optimiser steps that are safe on disk."""
    if is_complete(plan.folder / FINISHED):
        return plan.steps
    checkpoint = last_checkpoint(plan.folder)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0
