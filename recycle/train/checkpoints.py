"""Checkpoints that are complete, or are not used; and the error that keeps the last of them."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recycle.disk import file_sha256, is_write_failure, write_atomically
from recycle.errors import RecycleError

RECORD = "training.json"  # of the training so far
COMPLETE = "complete"  # written into a checkpoint last, with the hashes of the files before it


class TrainingError(RecycleError):
    """Training cannot go on; the last good checkpoint is kept."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones after it are removed."""
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", path.name)),
        key=lambda path: int(path.name.split("-")[1]),
    )
    while found and not is_complete(found[-1]):
        damaged = found.pop()
        is_folder = damaged.is_dir() and not damaged.is_symlink()
        shutil.rmtree(damaged) if is_folder else damaged.unlink()
    return found[-1] if found else None


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as written to its end."""
    write_atomically(checkpoint / COMPLETE, _hashes(checkpoint))


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder was sealed, and every file in it is as it was then."""
    mark = checkpoint / COMPLETE
    return mark.is_file() and mark.read_bytes() == _hashes(checkpoint)


def _hashes(checkpoint: Path) -> bytes:
    """SHA-256 of every file of a checkpoint but the seal itself."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]
    hashes = {path.relative_to(checkpoint).as_posix(): file_sha256(path) for path in files}
    return json.dumps(hashes, sort_keys=True).encode()


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Give what cannot be written one error.

    Raises:
        TrainingError: In the place of the libraries' own, of which a full disk is the usual cause.
    """
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise TrainingError(
            f"{what} could not be written: {str(error).splitlines()[0]}. The last good "
            "checkpoint is kept. Make room on that disk, then give the same command again."
        ) from error
