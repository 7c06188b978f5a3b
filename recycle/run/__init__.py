"""The main job: recipe -> backbone -> streams -> train -> compare -> report."""

import shutil
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from recycle import report, results
from recycle.backbone import load_backbone
from recycle.cost import estimate
from recycle.disk import write_atomically
from recycle.family import save_family
from recycle.progress import Display, minutes
from recycle.recipe import Resolved, dump, identity
from recycle.results import Results
from recycle.train import add_adapter, jobs, steps_left, train, writing

from .folder import (
    CHECKPOINTS,
    RECIPE,
    RESULTS,
    RunError,
    claimed,
    finished_results,
    run_folder,
    same_ground,
    saved_recipe,
)
from .measure import check_tokens, check_window, evaluate_again, measure, prepare_data
from .record import backbone_record, data_record, device_of, hardware, scored_documents, with_dtype
from .settle import as_before, settled, with_absolute_paths

__all__ = ["RunError", "evaluate_again", "measure", "run"]


def run(resolved: Resolved, command: str, console: Console) -> Results:
    """Recycle a backbone as a recipe says, and leave a run folder behind.

    A folder with the same recipe goes on where it stopped, or gives its results again if it is
    finished.

    Args:
        resolved: The recipe.
        command: The command line, for the record.
        console: Where progress and the table go.

    Raises:
        RunError: The folder belongs to another recipe, or another process is writing it.
        BackboneError, DataError, TrainingError: See there; the folder can be resumed after mending.
    """
    recipe = with_absolute_paths(resolved.recipe)
    folder = run_folder(recipe)
    saved = saved_recipe(recipe, folder)
    recipe = as_before(recipe, saved) if saved else recipe
    finished = finished_results(folder) if saved else None
    if finished is not None:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # left there by a kill
        console.print(f"{folder} is finished; its results:")
        console.print(results.rich_table(finished))
        return finished

    device = device_of(recipe)
    started = time.perf_counter()
    backbone = with_dtype(recipe.backbone, device)
    console.print(f"Backbone: {backbone.id} in {backbone.dtype} on {device}")
    with console.status("Loading the backbone; a file in a package is first dequantised, once"):
        model, tokenizer, source = load_backbone(backbone, device)
    check_window(recipe, model.config)
    console.print(f"Data: {recipe.data.source} {recipe.data.path or ''}".rstrip())
    splits = prepare_data(recipe, tokenizer)
    check_tokens(splits, model)
    recipe = settled(
        recipe,
        {
            "backbone": {"revision": source.revision, "dtype": backbone.dtype},
            "data": {"revision": splits.facts.get("revision")},
        },
    )
    setup = time.perf_counter() - started

    with claimed(folder):
        if saved_recipe(recipe, folder) and finished_results(folder):
            raise RunError(f"Another process has just finished {folder}. Run again to see it.")
        write_atomically(folder / RECIPE, dump(recipe).encode())
        same_ground(folder, source.fingerprint, str(model.dtype), splits.facts["sha256"])
        peft_model: Any = model
        trainings = []
        checkpoints = folder / CHECKPOINTS
        left = steps_left(recipe, checkpoints)
        with Display(console) as display:
            for position, job in enumerate(jobs(recipe)):
                peft_model = add_adapter(peft_model, job, recipe, splits.starts)
                if position == 0:
                    expected = estimate(peft_model, recipe, jobs(recipe), left)
                    console.print(
                        f"Expected: {minutes(expected.seconds)} and {expected.gib:.1f} GiB of "
                        f"{'GPU ' if device == 'cuda' else ''}memory, for training "
                        + "".join(
                            f"{name} on {n:,} tokens, " for name, n in expected.tokens.items()
                        )
                        + "and the comparison"
                    )
                place = checkpoints / job.adapter
                trainings.append(train(peft_model, tokenizer, job, splits, recipe, place, display))
            with writing(folder):
                save_family(peft_model, folder, source.fingerprint)
                tokenizer.save_pretrained(folder)

            started = time.perf_counter()
            measurements = measure(peft_model, splits, recipe, trainings, display)
            evaluation = time.perf_counter() - started

        record = Results(
            name=recipe.name,
            date=datetime.now(UTC),
            command=command,
            recipe=recipe.model_dump(mode="json"),
            recipe_identity=identity(recipe),
            packages=results.packages(),
            hardware=hardware(device),
            seeds={"data": recipe.data.seed, "training": recipe.training.seed},
            backbone=backbone_record(recipe, model, source),
            data=data_record(recipe, splits),
            training=tuple(trainings),
            documents=scored_documents(splits.test),
            models=results.compare(scored_documents(splits.test), measurements),
            wall_seconds=results.WallSeconds(
                setup=setup,
                training=sum(training.wall_seconds for training in trainings),
                evaluation=evaluation,
            ),
        )
        report.write_report(record, folder)
        results.write(record, folder / RESULTS)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # by another process as well
    console.print(results.rich_table(record))
    console.print(f"Report: {folder / 'report.md'}")
    return record
