"""A finished run's models on tasks and on other data, row by row into its record.

A row that is measured under the same settings is not measured again, so a call that was stopped
goes on where it was.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from recycle import data, report, results
from recycle.backbone import load_backbone, load_tokenizer
from recycle.data.held_out import read_held_out, windows_of_training
from recycle.evaluate import Pass, passes_of
from recycle.evaluate.exams import AnswersExam, Exam, HumanEvalExam, LossExam, Scores, digest
from recycle.evaluate.passes import narrowed, rows_of
from recycle.evaluate.sandbox import run_program
from recycle.family import ADAPTED, Family
from recycle.family.adapters import attach, check_backbone
from recycle.family.folder import read_members
from recycle.progress import Silent, display
from recycle.recipe import Data
from recycle.results import Results, TaskResult

from .asked import ANSWERS, HUMANEVAL, Asked
from .claim import claimed
from .folder import CHECKPOINTS, RESULTS, Found, RunError
from .plan import RunPlan, plan_run
from .streams import own_foundation
from .weights import foundation, load_compared

OURS = (ANSWERS, HUMANEVAL)  # all other tasks are the harness's, or in its form
WINDOW = 4096  # tokens, of a backbone that names none


def examine(found: Found, asked: Asked, out: str | None, command: str, console: Console) -> Results:
    """Measure the models of a finished run on tasks and on other data.

    Args:
        found: The finished run, with what is to be another way in its recipe.
        asked: Tasks, and data.
        out: A new file that takes the record in place of the run's own.
        command: The command line, for the record.
        console: Where progress and the table go.

    Raises:
        RunError, EvaluationError, SandboxError: What is asked for is not there, or cannot be run.
        BackboneError, DataError, FamilyError: See there.
    """
    assert found.results is not None
    plan, path = plan_run(found), Path(out or found.folder / RESULTS)
    with display(console) as progress, _held(found.folder if out is None else None):
        exams = list(_exams(plan, found, asked, progress))
        names = [exam.name for exam in exams]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RunError(
                f"Two of what is asked for are called {twice[0]}. Measure them one by one, or give "
                "one another name."
            )
        if out is not None:
            results.write(found.results, path)
        done = [_rows_done(path, exam) for exam in exams]
        for exam, rows in zip(exams, done, strict=True):
            if rows:
                progress.say(f"{exam.name}: measured before: {', '.join(sorted(rows))}")
        for model, passes in _models(plan, asked.p, set.intersection(*done)):
            for row, active in rows_of(passes).items():
                for exam, rows in zip(exams, done, strict=True):
                    if row in rows:
                        continue
                    progress.start(f"{exam.name}, {row}", exam.amount)
                    scores = exam.take(model, active, progress.advance)
                    _store(path, exam, row, scores, command)
            del model  # before another one is loaded
    record = results.read(path)
    measured = [x for exam in exams for x in record.tasks if _is_of(x, exam)]
    console.print(results.rich_tasks(measured))
    if out is None:
        report.write_report(record, found.folder)
    return record


@contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """Hold a run's folder against another `recycle eval`, whose rows would be lost."""
    if folder is None:
        yield
        return
    with claimed(folder):
        try:
            yield
        finally:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _exams(plan: RunPlan, found: Found, asked: Asked, progress: Silent) -> Iterator[Exam]:
    """What is asked for, ready to be taken; nothing heavy is loaded before all of it is found."""
    size, backbone = plan.recipe.evaluation.batch_size, plan.recipe.backbone
    computing = f"{backbone.quantization} computing in " if backbone.quantization else ""
    precision = f"{computing}{backbone.dtype}"
    apart = [pair for stage in plan.stages for pair in _made_tasks(stage.data)]
    tokenizer = load_tokenizer(found.folder)
    if ANSWERS in asked.tasks:
        yield AnswersExam(tokenizer, apart, size, precision)
    if HUMANEVAL in asked.tasks:
        run_program("")  # or it is said now that there is no sandbox
        window = min(tokenizer.model_max_length, WINDOW)
        yield HumanEvalExam(tokenizer, asked.samples, size, window, precision)
    if others := [name for name in asked.tasks if name not in OURS]:
        progress.start("finding the tasks")
        from recycle.evaluate.harness import HarnessExam, find_tasks

        # What fits a GPU is tried there; on a CPU a large batch is no faster.
        largest = None if plan.device == "cuda" else size
        for task in find_tasks(others, apart):
            yield HarnessExam(task, tokenizer, largest, precision)
    if asked.data is not None:
        yield _loss_exam(plan, found, asked.data, tokenizer, precision, progress)


def _made_tasks(asked: Data) -> list[tuple[int, int]]:
    """Count and seed of the made-up tasks in a data section."""
    parts = [asked, *asked.mix.values()]
    return [(x.conversations, asked.seed) for x in parts if x.source == "tasks"]


def _loss_exam(
    plan: RunPlan,
    found: Found,
    asked: Data,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    progress: Silent,
) -> LossExam:
    record = found.results
    assert record is not None
    progress.start("reading what the run learned from, to leave copies of it out")
    trained, checked = set[int](), False
    try:
        splits = data.prepare(
            plan.data,
            tokenizer,
            num_virtual_tokens=plan.recipe.method.num_virtual_tokens,
            num_starts=plan.num_starts,
        )
        recorded = [x.facts["sha256"] for x in (record.adapt_data, record.data) if x is not None]
        checked = [facts["sha256"] for facts in splits.facts] == recorded
    except data.DataError as error:
        progress.say(f"What the run learned from cannot be read: {error}")
    if checked:
        trained = windows_of_training(splits)
    else:
        progress.say(
            "Not checked: whether this text is in what the run learned from, which is not there as "
            "it was. What a model has learned by heart is no held-out text."
        )
    held_out = read_held_out(asked, tokenizer, trained)
    name = Path(asked.path).name if asked.path else asked.source
    settings: dict[str, JsonValue] = {
        "source": asked.source,
        "documents": held_out.documents,
        "blocks": len(held_out.blocks),
        "block_size": asked.block_size,
        "text": digest([x.input_ids for x in held_out.blocks]),
        "checked_against_training": checked,
        "left_out_as_trained_on": held_out.left_out,
        "precision": precision,
    }
    return LossExam(name, held_out.blocks, settings, plan.recipe.evaluation.batch_size)


def _models(
    plan: RunPlan, p: Sequence[int] | None, done: set[str]
) -> Iterator[tuple[Any, list[Pass]]]:
    """The models that rows are of, one in memory at a time; all P share the last.

    Those of which all rows are `done` are not loaded.
    """
    if plan.compare is not None and plan.compare.rows[0] not in done:
        yield load_compared(plan).eval(), [Pass(None, [plan.compare.rows[0]])]
    if plan.leaves_backbone and results.BACKBONE not in done:
        untouched = [Pass(None, [results.BACKBONE])]
        yield load_backbone(plan.recipe.backbone, plan.device)[0].eval(), untouched
    alone = results.ADAPTED if (plan.folder / ADAPTED).is_dir() else results.BACKBONE
    saved = Family.read(plan.folder)
    names = {alone} if not plan.streams[0].all_weights else set()
    names |= {results.CONTROL} if saved.control else set()
    if names.union(f"P = {x}" for x in saved.p_values if p is None or x in p) <= done:
        return
    members = read_members(plan.folder, saved)
    base = own_foundation(plan) or foundation(plan)
    check_backbone(
        members[0].config, base.source.fingerprint, str(plan.folder), plan.recipe.backbone.id
    )
    family = attach(base.model, members, plan.folder)
    passes = passes_of(family, alone)[1 if plan.streams[0].all_weights else 0 :]
    yield family, narrowed(passes, p)


def _is_of(result: TaskResult, exam: Exam) -> bool:
    return result.name == exam.name and result.settings == exam.settings


def _rows_done(path: Path, exam: Exam) -> set[str]:
    return {row for x in results.read(path).tasks if _is_of(x, exam) for row in x.scores}


def _store(path: Path, exam: Exam, row: str, scores: list[Scores], command: str) -> None:
    """Put a row's scores into the record, as it is on disk now."""
    record, now = results.read(path), datetime.now(UTC).replace(microsecond=0)
    tasks = list(record.tasks)
    for metric, higher, values, tokens in scores:
        fresh = TaskResult(
            name=exam.name,
            metric=metric,
            higher_is_better=higher,
            settings=exam.settings,
            date=now,
            command=command,
            tokens=tokens,
            scores={row: values},
        )
        same = [i for i, x in enumerate(tasks) if x.same_measurement(fresh)]
        if same:
            tasks[same[0]] = tasks[same[0]].merged(fresh.scores, now)
        else:
            tasks.append(fresh)
    results.write(record.model_copy(update={"tasks": tuple(tasks)}), path)
