"""Checkpoints in upstream's format, read tensor by tensor: a model never lies in memory whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .source import SourceError, SourceFiles, read_config, source_files

REQUIRED = ("parscale_n", "parscale_n_tokens", "hidden_size", "num_hidden_layers")
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read as one of upstream's, or its backbone is another model."""


@dataclass(frozen=True)
class Checkpoint:
    """An upstream checkpoint in a local folder.

    Args:
        folder: Where it lies.
        config: Content of its `config.json`.
        files: Its safetensors files.
    """

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @staticmethod
    def open(source: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder or a Hub id.

        Raises:
            CheckpointError: It is no upstream checkpoint, or its files are incomplete.
        """
        folder = _folder(source, revision)
        files = model_files(folder)
        config = read_config(files)
        missing = [key for key in REQUIRED if key not in config]
        if missing:
            raise CheckpointError(
                f"{source} is no checkpoint in upstream's format: its config.json (model type "
                f"{config.get('model_type')!r}) lacks {', '.join(missing)}."
            )
        wrong = {key: config[key] for key in REQUIRED if not isinstance(config[key], int)}
        if wrong:
            raise CheckpointError(f"{files.config} must hold whole numbers, got {wrong}.")
        if config["parscale_n"] < 2:
            raise CheckpointError(
                f"{source} has parscale_n = {config['parscale_n']}: one stream without a prefix is "
                "an ordinary model, and there is nothing to import."
            )
        return Checkpoint(folder, config, files.weights)

    @property
    def smoothing(self) -> float:
        """ε; 0.01 where the config leaves it out, as in upstream's code."""
        return self.config.get("parscale_attn_smooth", 0.01)

    def tensors(self) -> Iterator[tuple[Path, str, Tensor]]:
        """Every tensor with its file, one at a time.

        Raises:
            CheckpointError: A file is torn, or a tensor has values that are not finite.
        """
        for file in self.files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise CheckpointError(
                            f"{file}: tensor {name} has values that are not finite."
                        )
                    yield file, name, tensor


def model_files(model: str | Path) -> SourceFiles:
    """Where the files of a model's folder or Hub id lie.

    Raises:
        CheckpointError: It is no model, or its files are incomplete.
    """
    try:
        files = source_files(model)
        read_config(files)
    except SourceError as error:
        raise CheckpointError(str(error)) from None
    return files


def tensor_files(files: SourceFiles) -> dict[str, Path]:
    """The file of each tensor of a model."""
    where: dict[str, Path] = {}
    for file in files.weights:
        with _opened(file) as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    return where


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        reason = _first_cut(file) or str(error)
        raise CheckpointError(f"{file} is torn: {reason}. Fetch it again.") from None


def _first_cut(file: Path) -> str:
    """Which tensor a truncated file ends in; empty where the header itself is torn."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return ""
    missing = {
        name: 8 + length + entry["data_offsets"][1] - file.stat().st_size
        for name, entry in header.items()
        if name != "__metadata__"
    }
    cut = [name for name, count in missing.items() if count > 0]
    if not cut:
        return ""
    first = min(cut, key=lambda name: missing[name])
    return f"it ends within tensor {first}, {max(missing.values())} bytes are missing"


def _folder(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=DOWNLOADED))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{str(source)!r} is no folder here, and as a Hub id it could not be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from None
