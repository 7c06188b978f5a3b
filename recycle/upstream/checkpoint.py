"""Folders in upstream's format and of plain models: opened, and written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recycle.backbone.source import (
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    fetched,
    read_config,
    source_files,
)

from .layout import whole_config
from .tensors import CheckpointError, Stored, model_tensors

GENERATION = "generation_config.json"
REQUIRED = ("parscale_n", "hidden_size", "num_hidden_layers")


class Checkpoint(NamedTuple):
    """An upstream checkpoint in a local folder.

    Args:
        folder: Where it lies.
        config: Content of its `config.json`.
        tensors: Where each of its tensors lies.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @staticmethod
    def open(source: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder or a Hub id.

        Raises:
            BackboneError: There is none, or a file of it is missing or damaged.
            CheckpointError: It is no upstream checkpoint.
        """
        folder = fetched(source, revision, ["*.json", "*.safetensors", *TOKENIZER_FILES])
        files = source_files(folder)
        config = read_config(files)
        required = REQUIRED if config.get("parscale_n") == 1 else (*REQUIRED, "parscale_n_tokens")
        missing = [key for key in required if key not in config]
        if missing:
            raise CheckpointError(
                f"{source} is no checkpoint in upstream's format: its config.json (model type "
                f"{config.get('model_type')!r}) lacks {', '.join(missing)}."
            )
        wrong = {k: config[k] for k in required if type(config[k]) is not int or config[k] < 1}
        if wrong:
            raise CheckpointError(
                f"{files.config} must hold whole numbers, got {wrong}; each is at least 1."
            )
        smoothing = config.setdefault("parscale_attn_smooth", 0.01)  # as in upstream's code
        if type(smoothing) not in (int, float):
            raise CheckpointError(
                f"{files.config} has parscale_attn_smooth = {smoothing!r}; it is a number."
            )
        try:
            whole_config(config)
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{files.config} cannot be read as a Qwen2 model's: {reason}. Fetch it again."
            ) from None
        return Checkpoint(folder, config, model_tensors(files))


def write_model(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Stored | Tensor],
    weight_map: dict[str, str],
) -> None:
    """Write config.json, one file of weights at a time, and an index where they are shards.

    Args:
        folder: Where they are written.
        config: Content of config.json.
        tensors: Those that are stored are copied bit for bit, and checked: raises like
            `Stored.read`.
        weight_map: Each tensor's file.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files, size = set(weight_map.values()), 0
    for file in files:
        size += _write_weights(
            folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file}
        )
    if files != {SINGLE}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_weights(file: Path, tensors: dict[str, Stored | Tensor]) -> int:
    """Write a safetensors file, and return the bytes of its tensors."""
    read = {n: t.read() if isinstance(t, Stored) else t for n, t in tensors.items()}
    save_file(read, file, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in read.values())


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> bool:
    """Copy the files whose names match; whether there were any."""
    found = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    for file in found:
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(file, copied)
    return bool(found)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into. It takes the name `final` when all is written, or vanishes.

    Raises:
        CheckpointError: `final` exists, or cannot be written.
    """
    missing = [parent for parent in final.absolute().parents if not parent.exists()]
    check_new(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".new-") as scratch:
            folder = Path(scratch) / final.name
            folder.mkdir()
            yield folder
            check_new(final)
            folder.rename(final)
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise CheckpointError(
            f"{final} could not be written: {str(error).splitlines()[0]}. Make room there or name "
            "another folder, then give the same command again."
        ) from None


def check_new(final: Path) -> None:
    """Raise a CheckpointError where something has that name already."""
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already and is not overwritten. Name a new folder.")
