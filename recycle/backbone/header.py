"""Where each tensor lies in a safetensors file, read from its header."""

import json
from pathlib import Path
from typing import NamedTuple

from .errors import BackboneError


class Entry(NamedTuple):
    """A tensor in a file: its dtype in safetensors' words, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        BackboneError: The file is damaged; says in which tensor where that can be said.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged(file, "its header is cut off")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {
                name: Entry(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + offset for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(file, f"its header cannot be read ({error})") from None
    cut = [(entry.end, name) for name, entry in found.items() if entry.end > size]
    if cut:
        raise damaged(
            file, f"it ends within tensor {min(cut)[1]}, {max(cut)[0] - size} bytes are missing"
        )
    return found


def damaged(file: Path, reason: str) -> BackboneError:
    return BackboneError(f"{file} is damaged: {reason}. Fetch it again.")
