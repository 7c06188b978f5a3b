"""The run folder, held against other runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recycle import world

from .folder import CHECKPOINTS, DATA, RECIPE, RunError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder against other runs.

    The lock lies among the checkpoints and goes with them when the run is finished. A run that ends
    before its recipe was written leaves nothing.

    Raises:
        RunError: Another process holds it, or the place cannot be written.
    """
    lock = FileLock(folder / CHECKPOINTS / "lock")
    new = [x for x in (folder, *folder.parents) if not x.exists()]
    world.once(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        lock.release()
        if world.is_first() and not (folder / RECIPE).exists():
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for made in new:
                if made.is_dir() and not any(made.iterdir()):
                    made.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if not (folder / RECIPE).exists():  # then nobody knows whose data these are
            shutil.rmtree(folder / DATA, ignore_errors=True)
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
