"""One training, from what it starts from to its record."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from recycle import preemption, world
from recycle.cost.shortage import enough_memory
from recycle.data import Document
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead
from recycle.progress import Silent
from recycle.results import TrainingRecord

from .checkpoints import RECORD, TrainingError, is_complete, last_checkpoint, seal, writing
from .fitting import fit
from .learned import learned_parameters, load_learned, save_learned
from .plan import TrainingPlan, first_record
from .shortage import in_training
from .trainer import BEST, LEARNED, StreamTrainer
from .validation import Validation

FINISHED = "finished"  # folder of a finished training: its seal makes it one


def train(
    model: Any,
    plan: TrainingPlan,
    blocks: datasets.Dataset,
    validation: Sequence[Document],
    batch_size: int,
    progress: Silent,
) -> TrainingRecord:
    """Carry out one training, going on from its last good checkpoint.

    Args:
        model: The model with what is to learn, as it starts: all of its parameters that require
            gradients.
        plan: What to do.
        blocks: Rows of `input_ids` and `labels`, as many as the steps need.
        validation: Documents for the validation loss.
        batch_size: Documents in a pass of validation.
        progress: Shows how far it is.

    Returns:
        The record of the training. The model holds what was learned at the point of the lowest
        validation loss, also where an earlier call had finished the training already.

    Raises:
        TrainingError: A loss or a prefix's gradient is missing or not finite, memory is too small,
            or a checkpoint cannot be written.
    """
    finished = plan.folder / FINISHED
    if world.once(lambda: is_complete(finished)):
        load_learned(learned_parameters(model, plan), finished / LEARNED)
        return TrainingRecord.model_validate_json((finished / RECORD).read_text())
    with preemption.deferred():
        record = _learn(model, plan, blocks, validation, batch_size, progress)
        world.gather(None)  # all have read what `_finish` removes
        world.once(lambda: _finish(model, plan, record))
    return record


def _learn(
    model: Any,
    plan: TrainingPlan,
    blocks: datasets.Dataset,
    validation: Sequence[Document],
    batch_size: int,
    progress: Silent,
) -> TrainingRecord:
    """Train to the end, and leave in the model what was best."""
    record = first_record(plan)
    if plan.steps:
        checkpoint = world.once(lambda: last_checkpoint(plan.folder))
        use_cache = model.config.use_cache
        plan = fit(model, plan, "position_ids" in blocks.column_names, progress)
        enough = enough_memory(
            TrainingError, f"training {plan.adapter!r}", lambda: in_training(plan, model)
        )
        with enough, OutputHead(model, plan.at_once) as head:
            measured = Validation(plan, validation, batch_size)
            trainer = StreamTrainer(model, plan, blocks, measured, head, progress)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                trainer.release()
                model.config.use_cache = use_cache  # which the trainer switches off
        record = trainer.record
        if trainer.stopped and record.steps < plan.steps:
            raise preemption.Preempted
        del trainer
        gc.collect()  # of the optimiser, before another backbone is loaded
    if record.kept_step not in (None, plan.steps):
        learned = learned_parameters(model, plan)
        load_learned(learned, plan.folder / BEST.format(record.kept_step))
    return record


def _finish(model: Any, plan: TrainingPlan, record: TrainingRecord) -> None:
    """Write what was learned, and remove the checkpoints."""
    finished = plan.folder / FINISHED
    shutil.rmtree(finished, ignore_errors=True)  # of a process that was killed
    with writing(finished):
        finished.mkdir(parents=True)
        save_learned(learned_parameters(model, plan), finished / LEARNED)
        write_atomically(finished / RECORD, record.model_dump_json().encode())
        seal(finished)
    for unneeded in plan.folder.iterdir():  # only now: up to the seal they are needed
        if unneeded != finished:
            remove(unneeded)


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def steps_done(plan: TrainingPlan) -> int:
    """Optimiser steps that are safe on disk."""
    if is_complete(plan.folder / FINISHED):
        return plan.steps
    checkpoint = last_checkpoint(plan.folder)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0
