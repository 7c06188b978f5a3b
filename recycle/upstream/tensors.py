"""Tensors in safetensors files: found, mapped into memory, checked and compared.

A mapped tensor takes memory only while it is held, and of its file only what was looked at. A shard
is written whole, so that is what import and export take, and comparing a few megabytes. Measured on
shards of at most 44 MB: 53, 55 and 29 MB (pytest tests/test_export.py -k peak).
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recycle.backbone.header import damaged, read_header
from recycle.backbone.source import INDEX, SINGLE, SourceFiles
from recycle.errors import RecycleError

PIECE = 1 << 20  # values that are looked at together
DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"),
    *("I64", "I32", "I16", "I8", "U8", "BOOL"),
)


class CheckpointError(RecycleError):
    """A checkpoint cannot be read or written, or its backbone is another model."""


class Stored(NamedTuple):
    """A tensor where it lies in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def mapped(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or those rows of it, mapped from its file.

        Raises:
            BackboneError: The file is damaged.
        """
        try:
            with safe_open(self.file, "pt") as opened:
                rows: Tensor = opened.get_slice(self.name)[start:stop]
        except SafetensorError as error:
            raise damaged(self.file, str(error)) from None
        return rows

    def pieces(self) -> Iterator[Tensor]:
        """A few rows at a time, checked. Each is mapped anew: those before take no memory.

        Raises:
            BackboneError: The file is damaged.
            CheckpointError: A value is not finite.
        """
        many = max(1, PIECE // prod(self.shape[1:]))
        for start in range(0, self.shape[0], many):
            piece = self.mapped(start, start + many)
            if not _is_finite(piece):
                raise CheckpointError(
                    f"{self.file}: tensor {self.name} has values that are not finite. Fetch the "
                    "file again; if they are still there, the model is broken."
                )
            yield piece

    def read(self) -> Tensor:
        """The whole tensor, checked and mapped; raises like `pieces`."""
        for _ in self.pieces():
            pass
        return self.mapped()


def model_tensors(files: SourceFiles) -> dict[str, Stored]:
    """Where each tensor of a model lies; those that the model computes itself are left out.

    Raises:
        BackboneError: A file is damaged; says in which tensor.
        CheckpointError: The index of the shards is not true of them, or a tensor is of a type
            that no weights are of.
    """
    headers = {file: read_header(file) for file in files.weights}
    folder = files.config.parent
    if folder / SINGLE not in headers:
        for name, shard in json.loads((folder / INDEX).read_bytes())["weight_map"].items():
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{folder / INDEX} names the shard {shard!r}; shards lie beside it, under "
                    "plain file names."
                )
            if name not in headers[folder / shard]:
                raise CheckpointError(
                    f"{folder / shard} lacks tensor {name}, which by {INDEX} it holds. Fetch both "
                    "files again."
                )
    held = {}
    for file, header in headers.items():
        for name, entry in header.items():
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name} is of type {entry.dtype!r}, and known are "
                    f"{', '.join(DTYPES)}."
                )
            if not name.endswith("rotary_emb.inv_freq"):
                held[name] = Stored(file, name, entry.shape)
    return held


def difference(ours: Stored, theirs: Stored) -> float:
    """Largest difference of two tensors of one shape, compared in the lower of their precisions.

    It is 0 where they are the same in that precision. Raises like `Stored.pieces`.
    """
    largest = 0.0
    for a, b in zip(ours.pieces(), theirs.pieces(), strict=True):
        dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(_comparable(a.to(dtype)), _comparable(b.to(dtype))):
            largest = max(largest, (a.double() - b.double()).abs().max().item())
    return largest


def _comparable(piece: Tensor) -> Tensor:
    """What torch compares: it does not know how to with one byte's floating point."""
    one_byte = piece.is_floating_point() and piece.dtype.itemsize == 1
    return piece.float() if one_byte else piece


def _is_finite(piece: Tensor) -> bool:
    if not piece.is_floating_point():
        return True
    # The extremes are NaN if any value is. Measured: five times as fast as isfinite on them all.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(_comparable(piece)))
