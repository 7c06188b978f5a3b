"""Rows with fields as sources: JSON lines, Parquet files, and data sets on the Hub."""

import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from pyarrow.parquet import ParquetFile

from recycle.recipe import Data

from .chat import Conversation, read_conversation
from .files import matching
from .text import DataError, Text, sha256

HUB_TIMEOUT = 30.0  # seconds
# JSON, UTF-8 and Arrow (ValueErrors); the disk; gzip
UNREADABLE = (ValueError, RecursionError, OSError, EOFError, zlib.error)
UNREACHABLE = (HTTPError, OSError, datasets.exceptions.DatasetsError)
BATCH_ROWS = 256  # of a Parquet file, in memory at once
SHUFFLE_BUFFER = 4096  # documents held in memory to shuffle a stream


def read_rows(
    data: Data, facts: dict[str, Any], skipped: Counter[str], in_order: bool = False
) -> Iterator[Text]:
    """Rows of JSON lines or Parquet; the group is the value of data.group_field, or the row."""
    root, files = matching(data, skipped)
    facts |= {"path": data.path, "files": len(files), **_content(data)}
    if not in_order:
        random.Random(data.seed).shuffle(files)
    texts = _rows(files, root, data, skipped)
    yield from texts if in_order else _buffer_shuffled(texts, data.seed)


def _content(data: Data) -> dict[str, Any]:
    """What a row holds, for the facts."""
    if data.format == "chat":
        return {"format": "chat", "messages_field": data.messages_field}
    return {"text_field": data.text_field}


def _rows(files: list[Path], root: Path, data: Data, skipped: Counter[str]) -> Iterator[Text]:
    parsed = _parsed if data.source == "jsonl" else _parquet_rows
    for file in files:
        name = file.relative_to(root).as_posix()
        for number, row in parsed(file):
            where = f"{name}:{number}"
            yield from _row_text(row, data, where, where, skipped)


def _parsed(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file with their line numbers; damage of any kind is one DataError."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UNREADABLE as error:
        raise DataError(
            f"data.source=jsonl takes one JSON object in UTF-8 on each line; {file}, line "
            f"{number or 1}: {error}. Repair the file, or leave it out of data.path."
        ) from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, numbered from 1; damage of any kind is one DataError."""
    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (*UNREADABLE, pyarrow.ArrowException) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data.source=parquet takes Parquet files; {file}, after row {number}: {told}. Repair "
            "the file, or leave it out of data.path."
        ) from None


def _buffer_shuffled(texts: Iterable[Text], seed: int) -> Iterator[Text]:
    rng = random.Random(seed)
    buffer: list[Text] = []
    for text in texts:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(text)
        else:
            place = rng.randrange(SHUFFLE_BUFFER)
            yield buffer[place]
            buffer[place] = text
    rng.shuffle(buffer)
    yield from buffer


def read_hub(data: Data, facts: dict[str, Any], skipped: Counter[str]) -> Iterator[Text]:
    """Rows of a data set on the Hub; the group is as for JSON lines."""
    facts |= {name: getattr(data, name) for name in ("path", "subset", "split")} | _content(data)
    for row in _hub_rows(data, facts):
        # A row has no lasting number in a shuffled stream: its content names it.
        yield from _row_text(row, data, f"{data.path}, split {data.split}", None, skipped)


def _hub_rows(data: Data, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    path = str(data.path)
    if Path(path).exists():  # load_dataset would read it in place of the Hub's
        raise DataError(
            f"data.source=hub takes the id of a data set on the Hub, and data.path={path} is here "
            "on disk. Set `data.source=files` or `data.source=jsonl`, or run in another folder."
        )
    try:
        # The commit, so that results name what was read even when the data set moves on.
        info = HfApi().dataset_info(path, revision=data.revision, timeout=HUB_TIMEOUT)
        facts["revision"] = info.sha
        rows = datasets.load_dataset(
            path, data.subset, split=data.split, revision=info.sha, streaming=True
        )
    except (*UNREACHABLE, ValueError, RuntimeError) as error:  # a wrong split, a script
        raise _unreadable(data, error) from None
    try:
        yield from rows.shuffle(seed=data.seed, buffer_size=SHUFFLE_BUFFER)
    except (*UNREACHABLE, *UNREADABLE) as error:  # a damaged file of the data set
        raise _unreadable(data, error) from None


def _unreadable(data: Data, error: Exception) -> DataError:
    # The line after "404 Client Error. (Request ID: …)" says what is the matter.
    told = [line for line in str(error).splitlines() if line and "Client Error" not in line]
    reason = told[0].rstrip(". ") if told else type(error).__name__
    return DataError(
        f"Cannot read data.path={data.path} (subset {data.subset}, split {data.split}, revision "
        f"{data.revision}) from the Hub: {reason}. Check the name, the network and "
        "HF_HUB_OFFLINE; for a gated or private data set, accept its terms on its page and run "
        "`hf auth login`."
    )


def _row_text(
    row: Any, data: Data, where: str, name: str | None, skipped: Counter[str]
) -> Iterator[Text]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object with named fields, not {row!r:.60}.")
    chat = data.format == "chat"
    for key in ("group_field",) if chat else ("text_field", "group_field"):
        value = getattr(data, key)
        if value is not None and value not in row:
            raise DataError(
                f"data.{key}={value}: {where} has no such field. Its fields: "
                f"{', '.join(map(str, row))}. Set `data.{key}` to one of them."
            )
    conversation: Conversation | None = None
    if chat:
        conversation = read_conversation(row, data.messages_field, where)
        text, content = (
            conversation.text(),
            json.dumps(conversation.messages, ensure_ascii=False, default=str),
        )
    else:
        text = content = row[data.text_field]
    if text is None:
        skipped["empty"] += 1
    elif not isinstance(text, str):
        raise DataError(
            f"data.text_field={data.text_field} must name a field of text; {where} holds a "
            f"{type(text).__name__} there. Its fields: {', '.join(map(str, row))}."
        )
    elif not content.isascii() and content.encode("utf-8", "replace").decode() != content:
        skipped["not UTF-8"] += 1  # half of a surrogate pair, which JSON can spell
    else:
        name = name or sha256(text)[:16]
        group = None if data.group_field is None else row[data.group_field]
        yield Text(name if group is None else str(group), name, text, conversation)
