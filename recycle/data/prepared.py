"""Splits on disk: read and tokenised once, by one process, and mapped into memory by all.

Rows keep their order, so that the step of a checkpoint is the position in them: whatever goes on
from there, in however many processes, sees every row once and reads nothing again.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow as pa
import torch

from recycle import world
from recycle.disk import write_atomically

from .evaluation import Document
from .splits import Splits
from .text import DataError

RECORD = "splits.json"  # written last; rows lie beside it, a file for each stage


def keep(folder: Path, prepare: Callable[[], Splits]) -> Splits:
    """The splits that lie in a folder, or else those that the first process prepares and writes.

    Args:
        folder: Where they lie, or will.
        prepare: Reads the data.

    Raises:
        DataError: They cannot be read, or written.
    """
    world.once(lambda: None if (folder / RECORD).is_file() else _keep(prepare(), folder))
    return _read(folder)


def _keep(splits: Splits, folder: Path) -> None:
    try:
        _write(splits, folder)
    except OSError as error:
        raise DataError(
            f"The data could not be written into {folder}: {error.strerror or error}. Make room on "
            "that disk, then give the same command again."
        ) from error


def _write(splits: Splits, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    for number, rows in enumerate(splits.train):
        table = rows.data.table
        with (
            pa.OSFile(_rows(folder, number), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    record = {
        "validation": [[asdict(x) for x in each] for each in splits.validation],
        "test": [asdict(x) for x in splits.test],
        "starts": splits.starts.tolist(),
        "facts": splits.facts,
    }
    write_atomically(folder / RECORD, json.dumps(record).encode())


def _rows(folder: Path, stage: int) -> str:
    return str(folder / f"stage-{stage}.arrow")


def _read(folder: Path) -> Splits:
    record = json.loads((folder / RECORD).read_bytes())
    numbers = range(len(record["facts"]))
    return Splits(
        train=tuple(datasets.Dataset.from_file(_rows(folder, n)) for n in numbers),
        validation=tuple([Document(**x) for x in each] for each in record["validation"]),
        test=[Document(**x) for x in record["test"]],
        starts=torch.tensor(record["starts"], dtype=torch.int64),
        facts=tuple(record["facts"]),
    )
