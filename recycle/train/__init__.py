"""Training of a recipe's adapters, one after the other, on the frozen backbone.

Reading order: `jobs.py` (what is trained), `trainer.py` (the loss of every P from one pass, and
what is watched), `checkpoints.py` (going on after a kill), `estimate.py` (what it will take).
"""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recycle.data import Splits
from recycle.disk import write_atomically
from recycle.progress import Silent
from recycle.recipe import Recipe
from recycle.results import CurvePoint, LossPoint, TrainingRecord

from .checkpoints import TrainingError, is_whole, last_checkpoint, seal, writing
from .jobs import Job, add_adapter, jobs, steps
from .trainer import StreamTrainer

__all__ = [
    "Job",
    "StreamTrainer",
    "TrainingError",
    "add_adapter",
    "jobs",
    "last_checkpoint",
    "steps",
    "steps_left",
    "train",
    "writing",
]

FINISHED = "finished"  # folder of a finished training: its seal makes it one
RECORD, WEIGHTS = "training.json", "trained.safetensors"


def train(
    model: PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    splits: Splits,
    recipe: Recipe,
    folder: Path,
    progress: Silent,
) -> TrainingRecord:
    """Train one adapter on `splits.train`, going on from the last good checkpoint in `folder`.

    Returns:
        The record of the training. The adapter in `model` holds the trained values, also where an
        earlier call had finished the training already.

    Raises:
        TrainingError: A loss or a prefix's gradient is missing or not finite.
    """
    finished = folder / FINISHED
    if is_whole(finished):
        set_peft_model_state_dict(model, load_file(finished / WEIGHTS), adapter_name=job.adapter)
        return TrainingRecord.model_validate_json((finished / RECORD).read_text())
    total = steps(recipe)
    tokens = total * recipe.training.batch_size * recipe.data.block_size
    log: list[dict[str, Any]] = []
    seconds = elapsed = 0.0
    if total:
        trainer = StreamTrainer(model, tokenizer, job, splits, recipe, folder, progress)
        checkpoint = last_checkpoint(folder)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.release()
        log, seconds, elapsed = trainer.state.log_history, trainer.seconds, trainer.elapsed
    record = TrainingRecord(
        name=job.adapter,
        p_values=job.p_values,
        tokens=tokens,
        steps=total,
        wall_seconds=elapsed,
        tokens_per_second=tokens / seconds if seconds else None,
        stream_tokens_per_second=tokens * job.p_values[-1] / seconds if seconds else None,
        curve=tuple(CurvePoint.model_validate(x["curve"]) for x in log if "curve" in x),
        train_loss=tuple(LossPoint.model_validate(x["train"]) for x in log if "train" in x),
    )
    shutil.rmtree(finished, ignore_errors=True)  # of a process that was killed
    with writing(finished):
        finished.mkdir(parents=True)
        save_file(_adapter_state(model, job.adapter), finished / WEIGHTS)
        write_atomically(finished / RECORD, record.model_dump_json().encode())
        seal(finished)
    for unneeded in folder.glob("checkpoint-*"):  # only now: up to the seal they are needed
        shutil.rmtree(unneeded)
    return record


def steps_left(recipe: Recipe, checkpoints: Path) -> dict[str, int]:
    """Optimiser steps that each job still has to do, by its adapter's name.

    Args:
        checkpoints: The folder in which each job has a folder of its adapter's name.
    """
    left = {}
    for job in jobs(recipe):
        folder = checkpoints / job.adapter
        checkpoint = last_checkpoint(folder)
        done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        left[job.adapter] = 0 if is_whole(folder / FINISHED) else steps(recipe) - done
    return left


def _adapter_state(model: PeftModelForCausalLM, adapter: str) -> dict[str, Tensor]:
    # Told nothing about embeddings, PEFT looks for the backbone's config on the Hub.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}
