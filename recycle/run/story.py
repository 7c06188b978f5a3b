"""A run as a story: recipe -> plan -> backbone and data -> trainings -> comparison -> report."""

import shutil
import time
from datetime import UTC, datetime
from typing import Any

from peft import PeftModelForCausalLM
from rich.console import Console

from recycle import report, results
from recycle.cost import Work, estimate_run
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead, measure
from recycle.family.adapters import save_family
from recycle.parscale import ActiveStreams
from recycle.progress import Silent, display, duration
from recycle.recipe import dump, identity
from recycle.results import Results, TrainingRecord
from recycle.train import add_adapter, steps_done, train
from recycle.train.checkpoints import writing

from .folder import CHECKPOINTS, RECIPE, RESULTS, Found, RunError, claimed, finished_results
from .folder import saved_recipe as saved_recipe_of
from .machine import describe
from .materials import Materials, check_basis, load_materials
from .plan import RunPlan, plan_run


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
    started = time.perf_counter()
    plan = plan_run(found)
    backbone = plan.recipe.backbone
    console.print(f"Backbone: {backbone.id} in {backbone.dtype} on {plan.device}")
    console.print(f"Data: {plan.recipe.data.source} {plan.recipe.data.path or ''}".rstrip())
    with display(console) as progress:
        materials = load_materials(plan, progress)
        recipe = materials.settle(plan.recipe)
        setup = time.perf_counter() - started

        with claimed(plan.folder):
            if saved_recipe_of(recipe, plan.folder) and finished_results(plan.folder):
                raise RunError(
                    f"Another process has just finished {plan.folder}. Run again to see it."
                )
            write_atomically(plan.folder / RECIPE, dump(recipe).encode())
            check_basis(plan.folder, materials)
            model, trainings, announced = _train_all(plan, materials, progress)
            with writing(plan.folder):
                save_family(model, plan.folder, materials.source.fingerprint)
                materials.tokenizer.save_pretrained(plan.folder)

            started = time.perf_counter()
            speeds = {training.name: training.tokens_per_second for training in trainings}
            documents = materials.splits.test
            measurements = measure(model, documents, recipe.evaluation, speeds, progress)
            evaluation = time.perf_counter() - started
            record = Results(
                name=recipe.name,
                date=datetime.now(UTC),
                command=command,
                recipe=recipe.model_dump(mode="json"),
                recipe_identity=identity(recipe),
                packages=results.packages(),
                hardware=describe(plan.device),
                seeds={"data": recipe.data.seed, "training": recipe.training.seed},
                backbone=materials.backbone,
                data=materials.data,
                training=trainings,
                documents=materials.documents,
                models=results.compare(materials.documents, measurements),
                wall_seconds=results.WallSeconds(
                    announced=announced,
                    setup=setup,
                    training=sum(training.wall_seconds for training in trainings),
                    evaluation=evaluation,
                ),
            )
            results.write(record, plan.folder / RESULTS)
            report.write_report(record, plan.folder)
            shutil.rmtree(plan.folder / CHECKPOINTS, ignore_errors=True)
    console.print(results.rich_table(record))
    console.print(f"Report: {plan.folder / 'report.md'}")
    return record


def _train_all(
    plan: RunPlan, materials: Materials, progress: Silent
) -> tuple[PeftModelForCausalLM, tuple[TrainingRecord, ...], float]:
    """Train the adapters of a plan: the model with all of them, records, announced seconds."""
    recipe, splits = plan.recipe, materials.splits
    model: Any = materials.model
    records = []
    for training in plan.trainings:
        quantization = materials.source.quantization
        model = add_adapter(model, training, recipe.method, splits.starts, quantization)
        if training is plan.trainings[0]:
            announced = _announce(plan, materials, model, progress)
        batch_size = recipe.evaluation.batch_size
        records.append(
            train(model, training, splits.train, splits.validation, batch_size, progress)
        )
    return model, tuple(records), announced


def _announce(
    plan: RunPlan, materials: Materials, model: PeftModelForCausalLM, progress: Silent
) -> float:
    """Say from where a run goes on, and what the rest of it will take; the seconds."""
    progress.start("estimating time and memory")
    block, test = plan.recipe.data.block_size, len(materials.splits.test)
    work, parts = [], []
    for training in plan.trainings:
        done = steps_done(training)
        learned = (training.steps - done) * training.tokens_per_step
        blocks = training.validations(done) * len(materials.splits.validation) + test
        active = ActiveStreams(training.adapter, training.num_streams, training.p_values)
        work.append(Work(active, learned, blocks * block))
        begun = f" of {training.tokens:,}, going on from a checkpoint" if done else ""
        parts.append(f"{training.adapter} on {learned:,} tokens{begun}")
    with OutputHead(model) as head:
        expected = estimate_run(
            model,
            head.log_probs,
            work,
            backbone_read=test * block,
            block_size=block,
            micro_batch_size=plan.recipe.training.micro_batch_size,
            gradient_checkpointing=plan.recipe.training.gradient_checkpointing,
        )
    memory = f"{expected.gib:.1f} GiB of {'GPU ' if plan.device == 'cuda' else ''}memory"
    progress.say(
        f"Expected: {duration(expected.seconds)} and {memory}, for training {', '.join(parts)}, "
        "and the comparison"
    )
    return expected.seconds
