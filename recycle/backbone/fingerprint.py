"""Which backbone an adapter was trained on, told from the backbone's source files.

A prefix is learned for one set of weights and is worthless on any other, so an adapter records
the fingerprint of its backbone and is loaded on nothing else. The fingerprint is taken from files,
not from the loaded model: dtype, device and quantisation of the moment do not change it. It is of
the *source* files: the same weights saved in another dtype, or saved anew with another
configuration, are another backbone to it. A copy of the folder is the same backbone.

It costs four short reads in each tensor, whatever the tensor's size (0.01 s for the 272 tensors of
SmolLM2-135M). It is a sample: it tells models and fine-tunings apart, and does not prove that every
byte is equal.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .header import read_header
from .source import ANYONE, Access, SourceFiles, read_config, source_files

SLICES, SLICE_BYTES = 4, 64  # in each tensor: the first bytes, the last, and two slices between

# Keys of config.json that leave every logit as it is.
VOLATILE = {
    # Who wrote the file, and which code it came with.
    *("_commit_hash", "_name_or_path", "auto_map", "transformers_version"),
    # How the model is loaded and called.
    *("_attn_implementation_autoset", "attn_implementation", "dtype", "torch_dtype"),
    *("initializer_range", "output_attentions", "output_hidden_states", "return_dict", "use_cache"),
    # Token ids that only generation and padding read.
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
}


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a backbone; `config`, `tensors` and `samples` are SHA-256 in hex."""

    id: str
    """Hub id or absolute folder: no part of the identity."""
    revision: str | None
    """Commit on the Hub, None for a folder: no part of the identity either."""
    config: str
    """Of config.json without the keys in `VOLATILE`."""
    tensors: str
    """Of the sorted names and shapes of all tensors."""
    samples: str
    """Of a few slices of each tensor's bytes, as they lie in the file."""

    def to_dict(self) -> dict[str, str | None]:
        """As adapters record it; of a folder only the last part, since adapters are published."""
        return asdict(self) | {"id": Path(self.id).name if Path(self.id).is_absolute() else self.id}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Fingerprint":
        return cls(**data)


def fingerprint_model(
    source: str | os.PathLike[str], revision: str | None = None, access: Access = ANYONE
) -> Fingerprint:
    """Return the fingerprint of a model folder or of a model on the Hub.

    Args:
        source: a folder with config.json and safetensors, or a Hub id, whose files are downloaded
            unless they lie in the Hub's cache (loading the model needs the same files).
        revision: branch, tag or commit on the Hub; None for a folder.
        access: how the Hub is reached.

    Raises:
        BackboneError: no such model, no access to it, or files that are missing or damaged.
    """
    return fingerprint_files(source_files(source, revision, access))


def fingerprint_files(files: SourceFiles) -> Fingerprint:
    """Return the fingerprint of files that `source_files` has found."""
    tensors = {name: (path, e) for path in files.weights for name, e in read_header(path).items()}
    names_and_shapes = [[name, list(tensors[name][1].shape)] for name in sorted(tensors)]

    samples = hashlib.sha256()
    streams = {path: path.open("rb") for path in files.weights}
    try:
        for name in sorted(tensors):
            path, entry = tensors[name]
            samples.update(f"{name}:{entry.end - entry.start}:".encode())
            for piece in _slices(streams[path], entry.start, entry.end):
                samples.update(piece)
    finally:
        for stream in streams.values():
            stream.close()
    return Fingerprint(
        id=files.id,
        revision=files.revision,
        config=_sha256(_without_volatile(read_config(files))),
        tensors=_sha256(names_and_shapes),
        samples=samples.hexdigest(),
    )


def differences(a: Fingerprint, b: Fingerprint) -> list[str]:
    """Say in words what tells two backbones apart; empty if they are the same.

    Id and revision alone make no difference: a copy of a folder is the same backbone.
    """
    parts = {
        "config": "the configuration (config.json)",
        "tensors": "the tensors' names or shapes",
        "samples": "the tensors' values or stored dtype",
    }
    return [words for part, words in parts.items() if getattr(a, part) != getattr(b, part)]


def _slices(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield evenly spaced slices of a tensor's bytes, or all bytes where they are few."""
    if end - start <= SLICES * SLICE_BYTES:
        stream.seek(start)
        yield stream.read(end - start)
        return
    for number in range(SLICES):
        stream.seek(start + (end - start - SLICE_BYTES) * number // (SLICES - 1))
        yield stream.read(SLICE_BYTES)


def _without_volatile(value: Any) -> Any:
    """Drop volatile keys at every depth: models with several parts nest their configurations."""
    if isinstance(value, dict):
        return {key: _without_volatile(v) for key, v in value.items() if key not in VOLATILE}
    return value


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
