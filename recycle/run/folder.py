"""The run folder: whose it is, whether it is finished, and who is writing it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recycle import results
from recycle.parscale.fingerprint import Fingerprint, differences
from recycle.recipe import Recipe, RecipeError, differing_keys, load
from recycle.results import Results

RECIPE = "recipe.yaml"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
BACKBONE = "backbone.json"  # among the checkpoints: what they were made on


class RunError(ValueError):
    """The run folder cannot be used for this recipe."""


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return Path(recipe.output.dir or Path("runs") / recipe.name)


def previous_results(recipe: Recipe, folder: Path) -> Results | None:
    """The results of a finished run of the same recipe; None if the run is new or unfinished.

    Raises:
        RunError: The folder holds something else.
    """
    if not folder.exists():
        return None
    saved = folder / RECIPE
    if not folder.is_dir() or (not saved.is_file() and any(folder.iterdir())):
        raise RunError(
            f"{folder} exists and is no run folder (it has no {RECIPE}); nothing was changed. "
            "Choose another with output.dir=FOLDER."
        )
    if not saved.is_file():
        return None
    try:
        differing = differing_keys(load(saved), recipe)
    except RecipeError as error:
        raise RunError(f"{saved} cannot be read, so the run cannot be resumed: {error}") from None
    if differing:
        raise RunError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
            f"nothing was changed. "
            "Set these as they were to go on with that run, or choose another folder with "
            "output.dir=FOLDER."
        )
    return results.read(folder / RESULTS) if (folder / RESULTS).is_file() else None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes; the lock lies beside it.

    Raises:
        RunError: Another process holds it, or the place cannot be written.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"Another process is running in {folder}. Wait for it, or choose another folder "
            "with output.dir=FOLDER."
        ) from None
    except OSError as error:
        raise RunError(
            f"Cannot write in {folder.parent}: {error.strerror}. Choose another folder with "
            "output.dir=FOLDER."
        ) from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def same_backbone(folder: Path, backbone: Fingerprint) -> None:
    """Record the backbone that a run's checkpoints are made on, or compare it with the record.

    Raises:
        RunError: The checkpoints were made on another one.
    """
    record = folder / CHECKPOINTS / BACKBONE
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        results.write_atomically(record, json.dumps(backbone.to_dict()).encode())
        return
    before = Fingerprint.from_dict(json.loads(record.read_text()))
    if differing := differences(before, backbone):
        raise RunError(
            f"{folder} was begun on another backbone than lies at {backbone.id} now: "
            f"{'; '.join(differing)}. Put that one back, or choose another folder with "
            "output.dir=FOLDER."
        )
