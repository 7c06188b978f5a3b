"""Upstream's checkpoints (QwenLM/ParScale): a checkpoint in, an adapter and its backbone out.

Upstream keeps `model.layers.N.self_attn.prefix_k|prefix_v [P, H, n, Dk]` and
`model.aggregate_layer.0|2.{weight,bias}` beside the backbone's own tensors. Its first aggregator
layer reads the streams' concatenation with the stream innermost.
"""

import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config

from .checkpoint import Checkpoint, CheckpointError, model_files, read_tensor, tensor_files
from .config import ParScaleConfig
from .fingerprint import fingerprint
from .folder import BACKBONE, write_adapter
from .source import INDEX, read_config

__all__ = ["Checkpoint", "CheckpointError", "compare_backbone", "import_checkpoint"]

_PREFIX = re.compile(r"model\.layers\.(\d+)\.self_attn\.prefix_([kv])$")
_AGGREGATOR = re.compile(r"model\.aggregate_layer\.([02])\.(weight|bias)$")
_AGGREGATOR_NAMES = {"0": "hidden", "2": "output"}
_KV_NAMES = {"k": "parscale_keys", "v": "parscale_values"}
_TOKENIZER = ("token*", "vocab*", "merges*", "special_tokens*", "chat_template*")
_COMPUTED = (
    "hidden_act",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
        backbone: The model that the checkpoint was made from; checked by shapes and weights, then
            recorded, and P = 1 is offered.
        backbone_out: Write the checkpoint's own backbone there as a plain Qwen2 folder and record
            it. The default, if there is no `backbone`, is `out`/backbone. P = 1 is not offered,
            since that backbone may have been trained with the streams.
        revision: Of `source` on the Hub.

    Returns:
        The adapter's folder.

    Raises:
        CheckpointError: See `Checkpoint`; or `backbone` is another model; or a folder exists.
    """
    out = Path(out)
    if backbone is not None and backbone_out is not None:
        raise CheckpointError("Name either the backbone or where to write it, not both.")
    written_out = Path(backbone_out) if backbone_out is not None else None
    if written_out is not None and written_out.resolve() == (out / BACKBONE).resolve():
        written_out = None  # the default, written with the adapter
    elif written_out is not None and written_out.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            f"The backbone goes beside the adapter's folder {out}, or to {out / BACKBONE}, got "
            f"{written_out}."
        )
    for path in (out, written_out):
        if path is not None and path.exists():
            raise CheckpointError(
                f"{path} exists already and is not overwritten. Name a new folder."
            )
    checkpoint = Checkpoint.open(source, revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(checkpoint, out, backbone, written_out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} could not be written: {str(error).splitlines()[0]}. Make room there, then give "
            "the same command again."
        ) from None
    return out


def _write(
    checkpoint: Checkpoint, out: Path, backbone: str | None, written_out: Path | None
) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        adapter, plain = Path(scratch) / "adapter", Path(scratch) / "adapter" / BACKBONE
        config, state = _adapter(checkpoint)
        if backbone is not None:
            compare_backbone(checkpoint, backbone)
            identity = fingerprint(backbone)
        else:
            write_backbone(checkpoint, plain)
            config.backbone_trained = True
            final = (written_out or out / BACKBONE).resolve()
            identity = replace(fingerprint(plain), id=str(final))
        config.base_model_name_or_path = identity.id
        config.revision = identity.revision
        config.fingerprint = identity.to_dict()
        write_adapter(adapter, config, state)
        _copy(checkpoint.folder, adapter, _TOKENIZER)
        if written_out is not None:
            written_out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(plain, written_out)
        adapter.rename(out)


def _adapter(checkpoint: Checkpoint) -> tuple[ParScaleConfig, dict[str, Tensor]]:
    p, n = checkpoint.config["parscale_n"], checkpoint.config["parscale_n_tokens"]
    size = checkpoint.config["hidden_size"]
    aggregator_shapes = {
        "0.weight": (size, p * size),
        "0.bias": (size,),
        "2.weight": (p, size),
        "2.bias": (p,),
    }
    state: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file, name, tensor in checkpoint.tensors():
        if match := _PREFIX.match(name):
            module = f"model.layers.{match[1]}.self_attn"
            if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2]) != (p, n):
                raise _wrong_shape(file, name, tensor, f"P = {p} and n = {n}")
            shape = shapes.setdefault(module, [tensor.shape[1], 0, 0])
            shape[1 if match[2] == "k" else 2] = tensor.shape[3]
            key = f"base_model.model.{module}.stream_prefix.{_KV_NAMES[match[2]]}"
            state[key] = tensor.float()
        elif match := _AGGREGATOR.match(name):
            value = tensor.float()
            if tensor.shape != aggregator_shapes[f"{match[1]}.{match[2]}"]:
                raise _wrong_shape(file, name, tensor, f"P = {p} and a width of {size}")
            if match[1] == "0" and match[2] == "weight":
                value = _to_stream_major(value, p)
            leaf = f"p{p}_{_AGGREGATOR_NAMES[match[1]]}_{match[2]}"
            state[f"base_model.model.model.streams.parscale_aggregator.{leaf}"] = value
    layers = checkpoint.config["num_hidden_layers"]
    if len(state) != 2 * layers + 4:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(state)} prefix and aggregator tensors; {layers} "
            f"layers have {2 * layers + 4}."
        )
    config = ParScaleConfig(
        num_streams=p,
        num_virtual_tokens=n,
        smoothing=checkpoint.smoothing,
        init="random",
        decoder="model",
        hidden_size=size,
        attention_shapes=dict(sorted(shapes.items(), key=lambda item: int(item[0].split(".")[2]))),
        backbone_dtype=checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype")),
        inference_mode=True,
    )
    return config, state


def _wrong_shape(file: Path, name: str, tensor: Tensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name} has shape {tuple(tensor.shape)}, and config.json says {expected}."
    )


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
    _copy(checkpoint.folder, folder, (*_TOKENIZER, "generation_config.json"))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy(file, target)


def compare_backbone(checkpoint: Checkpoint, backbone: str) -> None:
    """Check by config, shapes and weights that `backbone` is the model inside the checkpoint.

    Weights of two precisions are compared in the lower one.

    Raises:
        CheckpointError: It is another model; says in what, by how many tensors and which is the
            first.
    """
    files = model_files(backbone)
    ours, theirs = (_computed(x) for x in (checkpoint.config, read_config(files)))
    other = [
        f"{key} is {theirs[key]} there, {ours[key]} in the checkpoint"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if other:
        raise CheckpointError(
            f"{backbone} is not the model inside {checkpoint.folder}: in config.json, "
            f"{'; '.join(other)}."
        )
    held = [tensor_files(model_files(checkpoint.folder)), tensor_files(files)]
    names = {name for name in held[0].keys() | held[1].keys() if not _is_new(name)}
    wrong = []
    for name in sorted(names):
        difference = _difference(*(_stored(name, files) for files in held))
        if difference:
            wrong.append(f"{name} {difference}")
    if wrong:
        raise CheckpointError(
            f"{backbone} is not the model inside {checkpoint.folder}: {len(wrong)} of {len(names)} "
            f"tensors are not the same; first: {wrong[0]}. If the checkpoint's backbone was "
            "trained with its streams, take it out of the checkpoint with --backbone-out DIR."
        )


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the outputs besides the weights, with transformers' defaults filled in."""
    whole = Qwen2Config.from_dict(config).to_dict()
    return {key: whole[key] for key in _COMPUTED}


def _stored(name: str, files: dict[str, Path]) -> Tensor | None:
    if name == _HEAD and name not in files:  # tied
        name = _EMBEDDING
    return read_tensor(files[name], name) if name in files else None


def _difference(ours: Tensor | None, theirs: Tensor | None) -> str:
    if ours is None or theirs is None:
        return "is missing in " + ("the checkpoint" if ours is None else "the backbone")
    if ours.shape != theirs.shape:
        return f"has shape {tuple(theirs.shape)} there, {tuple(ours.shape)} in the checkpoint"
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    if torch.equal(ours.to(dtype), theirs.to(dtype)):
        return ""
    return f"differs by up to {(ours.float() - theirs.float()).abs().max().item():.2g}"
