"""Checkpoints in upstream's format: found, checked for completeness, and opened."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import Qwen2Config

from recycle.backbone.source import (
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    SourceFiles,
    fetched,
    read_config,
    source_files,
)
from recycle.disk import expand

from .layout import first_of
from .tensors import CheckpointError, Stored, stored_tensors

REQUIRED = ("parscale_n", "hidden_size", "num_hidden_layers")
DOWNLOADED = ["*.json", "*.safetensors", *TOKENIZER_FILES]


@dataclass(frozen=True)
class Checkpoint:
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
            CheckpointError: It is no upstream checkpoint, or its files are incomplete.
        """
        folder = fetched(source, revision, DOWNLOADED)
        files = model_files(folder)
        config = read_config(files)
        required = REQUIRED if config.get("parscale_n") == 1 else (*REQUIRED, "parscale_n_tokens")
        missing = [key for key in required if key not in config]
        if missing:
            raise CheckpointError(
                f"{source} is no checkpoint in upstream's format: its config.json (model type "
                f"{config.get('model_type')!r}) lacks {', '.join(missing)}."
            )
        wrong = {key: config[key] for key in required if type(config[key]) is not int}
        if wrong:
            raise CheckpointError(f"{files.config} must hold whole numbers, got {wrong}.")
        smoothing = config.get("parscale_attn_smooth", 0.01)
        if type(smoothing) not in (int, float):
            raise CheckpointError(
                f"{files.config} has parscale_attn_smooth = {smoothing!r}; it is a number."
            )
        try:
            Qwen2Config.from_dict(deepcopy(config))
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{files.config} cannot be read as a Qwen2 model's: {reason}. Fetch it again."
            ) from None
        if config["parscale_n"] < 1:
            raise CheckpointError(
                f"{files.config} has parscale_n = {config['parscale_n']}; it is at least 1."
            )
        return Checkpoint(folder, config, model_tensors(files))

    @property
    def smoothing(self) -> float:
        """ε; 0.01 where the config leaves it out, as in upstream's code."""
        return self.config.get("parscale_attn_smooth", 0.01)

    def files(self) -> dict[Path, list[Stored]]:
        """The tensors of each file."""
        by_file: dict[Path, list[Stored]] = {}
        for tensor in self.tensors.values():
            by_file.setdefault(tensor.file, []).append(tensor)
        return by_file


def model_files(model: str | Path, revision: str | None = None) -> SourceFiles:
    """Where the files of a model's folder or Hub id lie.

    Raises:
        CheckpointError: It is no model, or its files are incomplete.
    """
    folder = expand(model)
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        _check_index(folder)
    return source_files(model, revision)


def model_tensors(files: SourceFiles) -> dict[str, Stored]:
    """Where each tensor of a model lies.

    Raises:
        CheckpointError: A file is damaged.
    """
    return {name: tensor for file in files.weights for name, tensor in stored_tensors(file).items()}


def _check_index(folder: Path) -> None:
    """Refuse an index whose shards are missing, or lack tensors that it says they hold."""
    shards: dict[str, list[str]] = {}
    try:
        for name, file in json.loads((folder / INDEX).read_bytes())["weight_map"].items():
            shards.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is no index of shards ({error}). Fetch it again."
        ) from None
    for file, names in sorted(shards.items()):
        if Path(file).name != file:
            raise CheckpointError(
                f"{folder / INDEX} names the shard {file!r}; shards lie beside it, under plain "
                "file names."
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file} is missing; by {INDEX} it holds tensor {first_of(names)}. Fetch "
                "that file."
            )
        held = stored_tensors(folder / file)
        lacking = [name for name in names if name not in held]
        if lacking:
            raise CheckpointError(
                f"{folder / file} lacks tensor {first_of(lacking)}, which by {INDEX} it holds. "
                "Fetch both files again."
            )


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
