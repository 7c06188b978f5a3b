"""The run folder: whose it is, whether it is finished, and who is writing it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recycle import results
from recycle.backbone.fingerprint import Fingerprint, differences
from recycle.disk import write_atomically
from recycle.errors import RecycleError
from recycle.recipe import SAVED, Recipe, RecipeError, differing_keys, holds_run, load
from recycle.results import Results

from .settle import as_before

RECIPE = SAVED
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
GROUND = "ground.json"  # among the checkpoints: what they were made on


class RunError(RecycleError):
    """The run folder cannot be used for this recipe."""


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return Path(recipe.output.dir or Path("runs") / recipe.name).expanduser()


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
            "changed. Choose another with output.dir=FOLDER."
        )
    try:
        saved = load(path)
    except RecipeError as error:
        raise RunError(f"{path} cannot be read, so the run cannot be resumed: {error}") from None
    differing = differing_keys(saved, as_before(recipe, saved))
    if differing:
        raise RunError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
            "nothing was changed. Set these as they were to go on with that run, or choose "
            "another folder with output.dir=FOLDER."
        )
    return saved


def _only_begun(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a run leaves that was killed before its recipe."""
    begun = {folder / CHECKPOINTS, folder / CHECKPOINTS / "lock", folder / f".{RECIPE}.tmp"}
    return begun.issuperset(folder.rglob("*"))


def finished_results(folder: Path) -> Results | None:
    """The results in a run folder; None if its run is new or unfinished."""
    return results.read(folder / RESULTS) if (folder / RESULTS).is_file() else None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes, from the first write on.

    The lock lies among the checkpoints and goes with them when the run is finished.

    Raises:
        RunError: Another process holds it, or the place cannot be written.
    """
    lock = FileLock(folder / CHECKPOINTS / "lock")
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"Another process is running in {folder}. Wait for it, or choose another folder with "
            "output.dir=FOLDER."
        ) from None
    except OSError as error:
        raise RunError(
            f"Cannot write in {folder}: {error.strerror}. Choose another folder with "
            "output.dir=FOLDER."
        ) from None
    try:
        yield
    finally:
        lock.release()


def same_ground(folder: Path, backbone: Fingerprint, dtype: str, data: dict[str, str]) -> None:
    """Record what a run's checkpoints are made on, or compare it with the record.

    Args:
        folder: The run folder.
        backbone: Its backbone.
        dtype: What the backbone computes in.
        data: SHA-256 of each split.

    Raises:
        RunError: The checkpoints were made on something else.
    """
    record = folder / CHECKPOINTS / GROUND
    now = {"backbone": backbone.to_dict(), "dtype": dtype, "data": data}
    if not record.is_file():
        write_atomically(record, json.dumps(now).encode())
        return
    try:
        before = json.loads(record.read_text())
        differing = differences(Fingerprint.from_dict(before["backbone"]), backbone)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{record} is torn ({error}), so the run cannot be resumed. Choose another folder with "
            "output.dir=FOLDER, or delete this one."
        ) from None
    if before["dtype"] != dtype:
        differing.append(f"it computed in {before['dtype']}, and this machine in {dtype}")
    if before["data"] != data:
        differing.append("the data were others (their SHA-256 differs)")
    if differing:
        raise RunError(
            f"{folder} was begun on something else than there is now: {'; '.join(differing)}. Put "
            "that back, or choose another folder with output.dir=FOLDER."
        )
