"""Files and paths: written in one piece, known by their hash, and with ~ filled in."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .errors import RecycleError

# What torch says when it cannot write a file.
TORCH_WRITER = "PytorchStreamWriter|iostream error|unexpected pos|Parent directory"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its path holds the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: left by a kill, written over
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json_object(path: Path, error: type[RecycleError]) -> dict[str, Any]:
    """The JSON object that a file holds; raises `error` where it is damaged or missing."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as problem:
        raise error(f"{path} is damaged ({problem}). Copy or fetch it again.") from None
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: it must hold a JSON object. Copy or fetch it again.")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with its leading ~ filled in.

    Raises:
        RecycleError: There is no home folder to fill in.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecycleError(
            f"{path} begins with the home folder, and this user has none. Write the path in full."
        ) from None


def is_write_failure(error: Exception) -> bool:
    """Whether an exception is a disk's fault: torch, safetensors and tokenizers have their own."""
    return (
        isinstance(error, OSError)
        or type(error).__name__ == "SafetensorError"
        or type(error) is Exception  # of tokenizers
        or (isinstance(error, RuntimeError) and re.search(TORCH_WRITER, str(error)) is not None)
    )
