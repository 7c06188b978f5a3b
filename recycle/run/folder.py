"""The run folder: whose it is, and whether it is finished."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle import results
from recycle.errors import RecycleError
from recycle.recipe import SAVED as RECIPE
from recycle.recipe import (
    Recipe,
    RecipeError,
    differing_keys,
    holds_run,
    next_free_folder,
    read_recipe,
    resolve,
    run_folder,
)
from recycle.results import Results

from .settle import as_before, with_absolute_paths

RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
DATA = f"{CHECKPOINTS}/data"  # as read and tokenised
OF_DATA = re.compile(r": (stages\.\w+\.)?data\.")  # in a message on a path
PRECISION = ("backbone.dtype", "backbone.quantization")  # which `recycle eval` may change


class RunError(RecycleError):
    """A run cannot be begun, continued or measured as asked for."""


@dataclass(frozen=True)
class Found:
    """What there is of a run before it starts."""

    recipe: Recipe
    """With absolute paths, and with what an earlier call of it decided."""
    folder: Path
    results: Results | None
    """Of a finished run."""


def find_run(recipe: Recipe, new: bool = False) -> Found:
    """Look where a recipe's run lies, and at what is there; writes nothing.

    Args:
        recipe: As it was asked for.
        new: Take the next free folder instead.

    Raises:
        RunError: The folder holds something else.
    """
    recipe = with_absolute_paths(recipe)
    folder = run_folder(recipe)
    if new:
        return Found(recipe, next_free_folder(folder), None)
    saved = saved_recipe(recipe, folder)
    if saved is None:
        return Found(recipe, folder, None)
    return Found(as_before(recipe, saved), folder, finished_results(folder))


def saved_recipe(recipe: Recipe, folder: Path) -> Recipe | None:
    """The recipe that lies in the folder of an earlier run of it; None if the run is new.

    Raises:
        RunError: The folder holds something else.
    """
    if not folder.exists():
        return None
    path = folder / RECIPE
    if not holds_run(folder):
        if folder.is_dir() and _only_begun(folder):
            return None
        raise RunError(
            f"{folder} exists and is no run folder (it has no {RECIPE} of a run); nothing was "
            "changed. Choose another with output.dir=FOLDER, or let --new find one."
        )
    try:
        saved = read_recipe(path)
    except RecipeError as error:
        raise RunError(f"{path} cannot be read, so the run cannot be resumed: {error}") from None
    differing = differing_keys(saved, as_before(recipe, saved))
    if differing:
        only_evaluation = all(key.startswith("evaluation.") for key in differing)
        again = f", or measure it again with `recycle eval {folder}`" if only_evaluation else ""
        raise RunError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
            "nothing was changed. Set these as they were to go on with that run, start a new one "
            f"with --new (in {next_free_folder(folder)}) or output.dir=FOLDER{again}."
        )
    return saved


def _only_begun(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a run leaves that was killed before its recipe."""
    begun = {folder / CHECKPOINTS, folder / CHECKPOINTS / "lock", folder / f".{RECIPE}.tmp"}
    return begun.issuperset(x for x in folder.rglob("*") if folder / DATA not in (x, *x.parents))


def finished_results(folder: Path) -> Results | None:
    """The results in a run folder; None if its run is new or unfinished."""
    return results.read(folder / RESULTS) if (folder / RESULTS).is_file() else None


def finish(found: Found) -> None:
    """Do for a finished run what a kill after its results left undone."""
    assert found.results is not None
    if not (found.folder / "README.md").is_file():  # the last file of a report
        from recycle.report import write_report

        write_report(found.results, found.folder)
    shutil.rmtree(found.folder / CHECKPOINTS, ignore_errors=True)


def find_finished(
    source: str,
    overrides: Sequence[str],
    out: str | None,
    backbone: str | None = None,
    needs_data: bool = True,
) -> Found:
    """A finished run that is to be measured again.

    Args:
        source: Its folder.
        overrides: `key=value` of the sections evaluation and launch, and of the backbone's
            precision. The data stay as they were.
        out: Where new results are to go.
        backbone: Where the backbone lies now, if not where the run recorded it.
        needs_data: Whether the text that it learned from must be where it was.

    Raises:
        RunError: It is no finished run, an override would need other adapters, or `out` exists.
        RecipeError: An override does not fit.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}. Name the folder of a finished run.")
    if not (folder / RESULTS).is_file():
        raise RunError(
            f"{folder} is no finished run: it has no {RESULTS}. Finish it with `recycle run`."
        )
    try:
        read_recipe(folder / RECIPE)
    except RecipeError:
        raise RunError(
            f"{folder / RECIPE} was written by another version of recycle, or changed: it does not "
            "fit this one. Measure the run with the version that made it, or run the recipe anew."
        ) from None
    if out is not None and Path(out).exists():
        raise RunError(f"{out} exists already and is not overwritten. Name a new file.")
    if out is not None and not Path(out).parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {Path(out).parent}.")
    keys = [override.partition("=")[0].strip() for override in overrides]
    fixed = [
        key
        for key in keys
        if key.partition(".")[0] not in ("evaluation", "launch") and key not in PRECISION
    ]
    if fixed:
        raise RunError(
            "`recycle eval` measures the same adapters and takes fields of data (another source), "
            f"evaluation and launch, {' and '.join(PRECISION)} only, got {', '.join(fixed)}."
        )
    moved = [] if backbone is None else [f"backbone.id={backbone}", "backbone.revision=null"]
    # Nothing is trained, so that no tracker has to be there.
    resolved = resolve(str(folder / RECIPE), [*overrides, *moved, "logging.to=none"])
    if missing := [x for x in resolved.missing if needs_data or not OF_DATA.search(x)]:
        raise RecipeError(resolved.chosen, missing)
    return Found(with_absolute_paths(resolved.recipe), folder, results.read(folder / RESULTS))


def next_to(folder: Path) -> list[Path]:
    """The runs beside a run that have its name, with a number or without: demo, demo-2."""
    name = re.sub(r"-\d+$", "", folder.name)
    same = re.compile(re.escape(name) + r"(-\d+)?")
    runs = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return sorted(x for x in runs if x != folder and same.fullmatch(x.name) and holds_run(x))


def kept(folder: Path) -> str:
    """What an interrupted run left to go on from, in words."""
    found = []
    for training in sorted((folder / CHECKPOINTS).glob("*/")):
        sealed = training.glob("checkpoint-*/complete")
        steps = [int(path.parent.name.rpartition("-")[2]) for path in sealed]
        if (training / "finished").is_dir():
            found.append(f"{training.name} is trained")
        elif steps:
            found.append(f"{training.name} has a checkpoint at step {max(steps):,}")
    if not found:
        return "Stopped before the first checkpoint: nothing was kept."
    return f"Stopped; {', '.join(found)}. The same command goes on from there."
