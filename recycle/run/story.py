"""A run as a story: recipe -> plan -> backbone and data -> weights -> streams -> comparison."""

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console

from recycle import report, results, world
from recycle.backbone.sample import linear_modules, watch
from recycle.cost.passes import peak_memory
from recycle.disk import write_atomically
from recycle.evaluate import Pass, measure, passes_of
from recycle.evaluate.passes import narrowed
from recycle.family import ADAPTED
from recycle.family.folder import BACKBONE
from recycle.progress import Silent, display
from recycle.recipe import dump, identity
from recycle.results import Measurement, Results
from recycle.train.checkpoints import writing

from .announcement import announce
from .claim import claimed
from .folder import CHECKPOINTS, DATA, RECIPE, RESULTS, Found, RunError, finished_results
from .folder import saved_recipe as saved_recipe_of
from .forecast import estimate_run
from .machine import describe, device_of
from .materials import Materials, check_basis, load_materials
from .parallel import in_parallel
from .plan import RunPlan, plan_run
from .streams import states_to_start_from, train_streams
from .weights import (
    Foundation,
    adapt,
    bring_adapter,
    count_parameters,
    find_adapter,
    foundation,
    measure_compared,
    train_compared,
)


def run_recipe(found: Found, command: str, console: Console) -> Results:
    """Recycle a backbone as a recipe says, and leave a run folder behind.

    Args:
        found: The recipe, its folder, and what is there; a finished run's results are not here.
        command: The command line, for the record.
        console: Where progress and the table go.

    Raises:
        RunError: The folder belongs to another recipe, or another process is writing it.
        BackboneError, DataError, TrainingError: See there; once that is put right, the same call
            goes on.
    """
    with world.joined(device_of(found.recipe.launch)):
        plan = world.once(lambda: in_parallel(plan_run(found), world.size()))
        return _carry_out(plan, command, console)


def _carry_out(plan: RunPlan, command: str, console: Console) -> Results:
    started = time.perf_counter()
    backbone, processes = plan.recipe.backbone, world.size()
    many = f", {processes} processes" if processes > 1 else ""
    many += ", each with a part of it" if plan.sharded else ""
    console.print(f"Backbone: {backbone.id} in {backbone.dtype} on {plan.device}{many}")
    for text in dict.fromkeys(f"{x.data.source} {x.data.path or ''}" for x in plan.stages):
        console.print(f"Data: {text}".rstrip())
    with display(console) as progress, claimed(plan.folder):
        model, materials = load_materials(plan, progress, plan.folder / DATA)
        recipe = materials.settle(plan.recipe)
        adapter = find_adapter(plan, materials, model)
        starts = states_to_start_from(plan)
        setup = time.perf_counter() - started

        def settle_folder() -> None:
            if saved_recipe_of(recipe, plan.folder) and finished_results(plan.folder):
                raise RunError(
                    f"Another process has just finished {plan.folder}. Run again to see it."
                )
            write_atomically(plan.folder / RECIPE, dump(recipe).encode())
            check_basis(plan.folder, materials, str(model.dtype))
            bring_adapter(adapter, plan.folder)

        world.once(settle_folder)
        seconds, gib = announce(plan, materials, model, progress)
        base, trainings = Foundation(model, materials.source), []
        measured: list[Measurement] = []
        if plan.leaves_backbone:
            measured += measure_backbone(plan, materials, model, progress)
            untouched = watch(model, linear_modules(model))
            del model, base  # before another one is loaded
            trainings += train_compared(plan, materials, progress)
            trainings += adapt(plan, materials, progress)
            measured += measure_compared(plan, materials, progress)
            base = foundation(plan, untouched)
        streams, records = train_streams(plan, materials, base, starts, progress)
        trainings += records

        started = time.perf_counter()
        measured += measure_streams(plan, materials, streams, progress)
        measured = results.with_training(measured, trainings)
        wall_seconds = results.WallSeconds(
            announced=seconds,
            setup=setup,
            training=sum(training.wall_seconds for training in trainings),
            evaluation=time.perf_counter() - started,
        )
        taken = peak_memory(torch.device(plan.device)) / 2**30
        memory = results.MemoryGib(announced=gib, taken=max(world.gather(taken)))

        def write() -> Results:
            with writing(plan.folder):
                materials.tokenizer.save_pretrained(plan.folder)
            record = Results(
                name=recipe.name,
                date=datetime.now(UTC),
                command=command,
                recipe=recipe.model_dump(mode="json"),
                recipe_identity=identity(recipe),
                packages=results.packages(),
                hardware=describe(plan.device),
                seeds={"data": plan.stages[-1].data.seed, "training": recipe.training.seed},
                backbone=materials.backbone,
                data=materials.data[-1],
                adapt_data=materials.data[0] if len(materials.data) > 1 else None,
                training=tuple(trainings),
                documents=materials.documents,
                models=results.compare(materials.documents, measured),
                wall_seconds=wall_seconds,
                memory_gib=memory,
                estimates=estimate_run(plan),
                samples=materials.samples.records(
                    materials.tokenizer, [row.name for row in measured]
                ),
            )
            results.write(record, plan.folder / RESULTS)
            report.write_report(record, plan.folder)
            shutil.rmtree(plan.folder / CHECKPOINTS, ignore_errors=True)
            return record

        record = world.once(write)
    console.print(results.rich_table(record))
    console.print(f"Report: {plan.folder / 'report.html'}")
    return record


def measure_backbone(
    plan: RunPlan, materials: Materials, model: Any, progress: Silent
) -> list[Measurement]:
    """The untouched backbone, where the streams are put on another model: its speed is P = 1's."""
    settings = plan.recipe.evaluation.model_copy(update={"speed": False})
    passes = [Pass(None, [results.BACKBONE])]
    test, tokenizer = materials.splits.test, materials.tokenizer
    samples = materials.samples
    return measure(model, passes, test, settings, tokenizer, progress, samples=samples)


def measure_streams(
    plan: RunPlan,
    materials: Materials,
    model: Any,
    progress: Silent,
    p: Sequence[int] | None = None,
) -> list[Measurement]:
    """The model that the streams were put on, the control and each P, or some of these."""
    adapted = plan.folder / ADAPTED
    alone = results.ADAPTED if adapted.is_dir() else results.BACKBONE
    passes, parameters = passes_of(model, alone), {}
    if adapted.is_dir():
        parameters[alone] = count_parameters(adapted)
    own = 0
    if plan.streams[0].all_weights:
        passes, parameters = passes[1:], {}
        own = count_parameters(plan.folder / BACKBONE)
    passes = narrowed(passes, p)
    settings, samples = plan.recipe.evaluation, materials.samples
    test, tokenizer = materials.splits.test, materials.tokenizer
    at_once = plan.recipe.stages.streams.at_once
    measured = measure(
        model, passes, test, settings, tokenizer, progress, parameters, samples, at_once
    )
    more = [x.adapter_parameters + own for x in measured]
    return [
        x.model_copy(update={"adapter_parameters": n}) for x, n in zip(measured, more, strict=True)
    ]
