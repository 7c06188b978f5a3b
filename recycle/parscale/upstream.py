"""Upstream's checkpoints (QwenLM/ParScale): a checkpoint in, an adapter and its backbone out.

Upstream keeps `model.layers.N.self_attn.prefix_k|prefix_v [P, H, n, Dk]` and `model.aggregate_layer.0|2.{weight,bias}` beside
the backbone's own tensors. Its first aggregator layer reads the streams' concatenation with the stream innermost.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ParScaleConfig
from .family import write_adapter
from .fingerprint import fingerprint

_PREFIX = re.compile(r"model\.layers\.(\d+)\.self_attn\.prefix_([kv])$")
_AGGREGATOR = re.compile(r"model\.aggregate_layer\.([02])\.(weight|bias)$")
_KEYS = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth")
_AGGREGATOR_NAMES = {"0": "hidden", "2": "output"}
_KV_NAMES = {"k": "parscale_keys", "v": "parscale_values"}
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be read as one of upstream's, or its backbone is another model."""


@dataclass(frozen=True)
class Checkpoint:
    """An upstream checkpoint in a local folder, read tensor by tensor.

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
        try:
            config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no config.json, so it is no checkpoint.") from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{folder / 'config.json'} is torn: {error}.") from None
        missing = [key for key in _KEYS[:2] if key not in config]
        if missing:
            raise CheckpointError(
                f"{source} is no checkpoint in upstream's format: its config.json (model type "
                f"{config.get('model_type')!r}) lacks {', '.join(missing)}."
            )
        if config["parscale_n"] < 2:
            raise CheckpointError(
                f"{source} has parscale_n = {config['parscale_n']}: one stream without a prefix is an ordinary "
                "model, and there is nothing to import."
            )
        return Checkpoint(folder, config, _weight_files(folder))

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
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_tensor(name)
                        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                            raise CheckpointError(
                                f"{file}: tensor {name} has values that are not finite."
                            )
                        yield file, name, tensor
            except (SafetensorError, FileNotFoundError) as error:
                raise CheckpointError(
                    f"{file} is missing or torn ({error}). Fetch it again."
                ) from None


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    backbone: str | None = None,
    backbone_out: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Turn an upstream checkpoint into an adapter folder that `recycle.load` takes.

    Args:
        source: Local folder or Hub id of the checkpoint.
        out: The adapter's folder; must not exist.
        backbone: The model that the checkpoint was made from; checked by shapes and weights, then recorded, and P = 1 is
            offered.
        backbone_out: Write the checkpoint's own backbone there as a plain Qwen2 folder and record it. The default, if there
            is no `backbone`, is `out`/backbone. P = 1 is not offered, since that backbone may have been trained with the
            streams.
        revision: Of `source` on the Hub.

    Returns:
        The adapter's folder.

    Raises:
        CheckpointError: See `Checkpoint`; or `backbone` is another model; or a folder exists already.
    """
    out = Path(out)
    if backbone is not None and backbone_out is not None:
        raise CheckpointError("Name either the backbone or where to write it, not both.")
    written_out = Path(backbone_out) if backbone_out is not None else None
    for path in (out, written_out):
        if path is not None and path.exists():
            raise CheckpointError(
                f"{path} exists already and is not overwritten. Name a new folder."
            )
    checkpoint = Checkpoint.open(source, revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        adapter = Path(scratch) / "adapter"
        config, state = _adapter(checkpoint)
        adapter.mkdir()
        if backbone is not None:
            compare_backbone(checkpoint, backbone)
            identity = fingerprint(backbone)
        else:
            plain = Path(scratch) / "backbone"
            write_backbone(checkpoint, plain)
            identity = fingerprint(plain)
            final = (written_out or out / "backbone").resolve()
            config.base_model_name_or_path = str(final)
            config.backbone_trained = True
            if written_out is None:
                plain.rename(adapter / "backbone")
            else:
                written_out.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(plain, written_out)
            identity = type(identity).from_dict({**identity.to_dict(), "id": str(final)})
        config.base_model_name_or_path = identity.id
        config.revision = identity.revision
        config.fingerprint = identity.to_dict()
        write_adapter(adapter, config, state)
        for file in checkpoint.folder.glob("token*"):
            shutil.copy(file, adapter)
        adapter.rename(out)
    return out


def _adapter(checkpoint: Checkpoint) -> tuple[ParScaleConfig, dict[str, Tensor]]:
    p = checkpoint.config["parscale_n"]
    state: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file, name, tensor in checkpoint.tensors():
        if match := _PREFIX.match(name):
            module = f"model.layers.{match[1]}.self_attn"
            expected = (p, checkpoint.config["parscale_n_tokens"])
            if (tensor.shape[0], tensor.shape[2]) != expected:
                raise CheckpointError(
                    f"{file}: {name} has shape {tuple(tensor.shape)}, and config.json says P = {expected[0]} and "
                    f"n = {expected[1]}."
                )
            shape = shapes.setdefault(module, [tensor.shape[1], 0, 0])
            shape[1 if match[2] == "k" else 2] = tensor.shape[3]
            key = f"base_model.model.{module}.stream_prefix.{_KV_NAMES[match[2]]}"
            state[key] = tensor.float()
        elif match := _AGGREGATOR.match(name):
            value = tensor.float()
            if match[1] == "0" and match[2] == "weight":
                value = _to_stream_major(value, p)
            key = f"base_model.model.model.streams.parscale_aggregator.p{p}_{_AGGREGATOR_NAMES[match[1]]}_{match[2]}"
            state[key] = value
    layers = checkpoint.config["num_hidden_layers"]
    if len(state) != 2 * layers + 4:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(state)} prefix and aggregator tensors; {layers} layers have "
            f"{2 * layers + 4}."
        )
    config = ParScaleConfig(
        num_streams=p,
        num_virtual_tokens=checkpoint.config["parscale_n_tokens"],
        smoothing=checkpoint.smoothing,
        init="random",
        decoder="model",
        hidden_size=checkpoint.config["hidden_size"],
        attention_shapes=dict(sorted(shapes.items(), key=lambda item: int(item[0].split(".")[2]))),
        backbone_dtype=checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype")),
        inference_mode=True,
    )
    return config, state


def _to_stream_major(weight: Tensor, p: int) -> Tensor:
    size = weight.shape[0]
    return weight.view(size, size, p).transpose(1, 2).reshape(size, p * size).contiguous()


def _is_new(name: str) -> bool:
    return bool(_PREFIX.match(name) or _AGGREGATOR.match(name))


def write_backbone(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's backbone as a plain Qwen2 folder, one file for each of its own."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    size = 0
    shard: dict[str, Tensor] = {}
    current: Path | None = None

    def flush() -> None:
        if current is not None and shard:
            save_file(shard, folder / current.name, metadata={"format": "pt"})
            shard.clear()

    for file, name, tensor in checkpoint.tensors():
        if file != current:
            flush()
            current = file
        if not _is_new(name):
            shard[name] = tensor
            weight_map[name] = file.name
            size += tensor.nbytes
    flush()
    if len(checkpoint.files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if not key.startswith("parscale_") and key != "auto_map"
    }
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in ("token*", "vocab*", "merges*", "generation_config.json", "special_tokens*"):
        for file in checkpoint.folder.glob(pattern):
            shutil.copy(file, folder)


def compare_backbone(checkpoint: Checkpoint, backbone: str) -> None:
    """Check by shapes and weights that `backbone` is the model inside the checkpoint.

    Weights of two precisions are compared in the lower one.

    Raises:
        CheckpointError: It is another model; says by how many tensors and which is the first.
    """
    files = _weight_files(_folder(backbone, None))
    where = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    tied = "lm_head.weight"
    compared, wrong = 0, []
    for _, name, tensor in checkpoint.tensors():
        if _is_new(name):
            continue
        if name not in where:
            if name != tied:
                wrong.append(f"{name} is missing there")
            continue
        with safe_open(where[name], "pt") as tensors:
            other = tensors.get_tensor(name)
        compared += 1
        if other.shape != tensor.shape:
            wrong.append(f"{name} has shape {tuple(other.shape)} there, {tuple(tensor.shape)} here")
            continue
        dtype = min(other.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(other.to(dtype), tensor.to(dtype)):
            difference = (other.float() - tensor.float()).abs().max().item()
            wrong.append(f"{name} differs by up to {difference:.2g}")
    if wrong:
        raise CheckpointError(
            f"{backbone} is not the model inside {checkpoint.folder}: of {compared + len(wrong)} tensors "
            f"{len(wrong)} are not the same; first: {wrong[0]}. If the checkpoint's backbone was trained with its streams, "
            "take it out of the checkpoint with --backbone-out DIR."
        )


def _folder(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        patterns = ["*.json", "*.safetensors", "*.txt"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{str(source)!r} is no folder here, and as a Hub id it could not be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names.")
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor {INDEX}; only safetensors are read."
    )
