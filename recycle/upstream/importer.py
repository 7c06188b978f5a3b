"""Upstream's checkpoints (QwenLM/ParScale): a checkpoint in, an adapter and its backbone out.

The names and layout of the tensors are in `layout.py`, the way back is in `export.py`.
"""

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from recycle.backbone.fingerprint import fingerprint_model
from recycle.backbone.source import INDEX, SINGLE, TOKENIZER_FILES, read_config
from recycle.disk import expand
from recycle.family.folder import BACKBONE, write_adapter
from recycle.parscale.config import ParScaleConfig

from .checkpoint import Checkpoint, check_new, model_files, model_tensors, new_folder
from .layout import (
    BIASES,
    EMBEDDING,
    GENERATION,
    HEAD,
    Sizes,
    backbone_names,
    copy_files,
    first_of,
    is_new,
    new_shapes,
    our_name,
    to_ours,
)
from .qwen2 import upstream_config
from .tensors import CheckpointError, Stored, difference, write_tensors

_COMPUTED = (
    "hidden_act",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    backbone: str | None = None,
    backbone_out: str | Path | None = None,
    revision: str | None = None,
) -> Path | None:
    """Turn an upstream checkpoint into an adapter folder that `recycle.load` takes.

    A checkpoint of one stream (`parscale_n` = 1) has no prefix, so there is no adapter in it: it is
    turned into a plain Qwen2 model at `backbone_out`, or `out`. Files are read by pieces.

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
        The folder that was written: the adapter's, or of one stream the model's. None where nothing
        was: there is one stream, and `backbone` is that model.

    Raises:
        CheckpointError: See `Checkpoint`; or a tensor is missing or has values that are not finite;
            or `backbone` is another model; or a folder exists or cannot be written.
    """
    out = expand(out)
    if backbone is not None and backbone_out is not None:
        raise CheckpointError("Name either the backbone or where to write it, not both.")
    written_out = expand(backbone_out) if backbone_out is not None else None
    if written_out is not None and written_out.resolve() == (out / BACKBONE).resolve():
        written_out = None  # the default, written with the adapter
    for path in (out, written_out):
        if path is not None:
            check_new(path)
    if written_out is not None and _nested(written_out.resolve(), out.resolve()):
        raise CheckpointError(
            f"The backbone goes beside the adapter's folder {out}, or to {out / BACKBONE}, got "
            f"{written_out}."
        )
    checkpoint = Checkpoint.open(source, revision)
    _check_names(checkpoint)
    if checkpoint.config["parscale_n"] == 1:
        return _import_one_stream(checkpoint, written_out or out, backbone)
    config, state = _adapter(checkpoint)
    if backbone is not None:
        compare_backbone(checkpoint, backbone)
    with (
        new_folder(out) as adapter,
        new_folder(written_out) if written_out else nullcontext(adapter / BACKBONE) as plain,
    ):
        if backbone is not None:
            identity = fingerprint_model(backbone)
        else:
            write_backbone(checkpoint, plain)
            config.backbone_trained = True
            final = (written_out or out / BACKBONE).resolve()
            identity = replace(fingerprint_model(plain), id=str(final))
        config.base_model_name_or_path = identity.id
        config.revision = identity.revision
        config.fingerprint = identity.to_dict()
        write_adapter(adapter, config, state)
        copy_files(checkpoint.folder, adapter, TOKENIZER_FILES)
    return out


def _nested(a: Path, b: Path) -> bool:
    return a.is_relative_to(b) or b.is_relative_to(a)


def _import_one_stream(checkpoint: Checkpoint, out: Path, backbone: str | None) -> Path | None:
    if backbone is not None:
        compare_backbone(checkpoint, backbone)
        return None
    with new_folder(out) as folder:
        write_backbone(checkpoint, folder)
    return out


def _check_names(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors missing, or with prefixes where there is one stream."""
    config, held = checkpoint.config, checkpoint.tensors
    new = sorted(name for name in held if is_new(name))
    layers = config["num_hidden_layers"]
    expected = 0 if config["parscale_n"] == 1 else 2 * layers + 4
    if config["parscale_n"] == 1 and new:
        raise CheckpointError(
            f"{checkpoint.folder} has parscale_n = 1: one stream has no prefix, and yet "
            f"{held[new[0]].file} holds tensor {first_of(new)}. Fetch the checkpoint again."
        )
    if len(new) != expected:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(new)} prefix and aggregator tensors; {layers} "
            f"layers have {expected}. Fetch the checkpoint again."
        )
    tied = config.get("tie_word_embeddings", False)
    missing = sorted(backbone_names(layers, tied) - held.keys())
    if missing:
        files = ", ".join(sorted(file.name for file in checkpoint.files()))
        raise CheckpointError(
            f"{checkpoint.folder} lacks tensor {first_of(missing)}: no file of it ({files}) holds "
            "what a Qwen2 model of its config.json has. Fetch the checkpoint again."
        )
    with torch.device("meta"):
        plain = Qwen2ForCausalLM(Qwen2Config.from_dict(deepcopy(config)))
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    for name, tensor in held.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, and by config.json it is "
                f"{shapes[name]}. Fetch the checkpoint again."
            )
        if name not in shapes and name not in new and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{tensor.file} holds tensor {name}, which a Qwen2 model of its config.json does "
                "not have. Fetch the checkpoint again."
            )


def _adapter(checkpoint: Checkpoint) -> tuple[ParScaleConfig, dict[str, Tensor]]:
    sizes = Sizes.of(checkpoint.config)
    state: dict[str, Tensor] = {}
    for name, shape in new_shapes(sizes).items():
        tensor = checkpoint.tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, and by config.json it is "
                f"{shape} for P = {sizes.p} and n = {sizes.n}."
            )
        state[our_name(name, sizes.p)] = to_ours(name, tensor.read(), sizes.p)
    config = ParScaleConfig(
        num_streams=sizes.p,
        num_virtual_tokens=sizes.n,
        smoothing=checkpoint.smoothing,
        init="random",
        decoder="model",
        hidden_size=sizes.width,
        attention_shapes={
            f"model.layers.{layer}.self_attn": [
                sizes.num_key_value_heads,
                sizes.head_dim,
                sizes.head_dim,
            ]
            for layer in range(sizes.layers)
        },
        backbone_dtype=checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype")),
        inference_mode=True,
    )
    return config, state


def write_backbone(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's backbone as a plain Qwen2 folder, one file for each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    size = 0
    by_file = checkpoint.files()
    for file, tensors in by_file.items():
        kept: dict[str, Stored] = {t.name: t for t in tensors if not is_new(t.name)}
        if kept:
            size += write_tensors(folder / file.name, kept)
            weight_map |= dict.fromkeys(kept, file.name)
    if {file.name for file in by_file} != {SINGLE}:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if not key.startswith("parscale_") and key != "auto_map"
    }
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_files(checkpoint.folder, folder, (*TOKENIZER_FILES, GENERATION))


def compare_backbone(checkpoint: Checkpoint, backbone: str) -> None:
    """Check by config, shapes and weights that `backbone` is the model inside the checkpoint.

    Weights of two precisions are compared in the lower one. A Llama is a Qwen2 with biases of zero.

    Raises:
        CheckpointError: It is another model; says in what, by how many tensors and which is the
            first.
    """
    files = model_files(backbone)
    config = read_config(files)
    llama = config.get("model_type") == "llama"
    if llama:
        config = upstream_config(config, backbone, "float32")
    ours, theirs = _computed(checkpoint.config), _computed(config)
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
    held = [checkpoint.tensors, model_tensors(files)]
    names = {name for name in held[0].keys() | held[1].keys() if not is_new(name)}
    wrong = []
    for name in sorted(names):
        mine, other_one = (_stored(name, tensors) for tensors in held)
        if llama and other_one is None and mine is not None and name.endswith(BIASES):
            differing = "is not zero, as a Llama has it" * _any(mine)
        else:
            differing = _difference(mine, other_one)
        if differing:
            wrong.append(f"{name} {differing}")
    if wrong:
        raise CheckpointError(
            f"{backbone} is not the model inside {checkpoint.folder}: {len(wrong)} of {len(names)} "
            f"tensors are not the same; first: {wrong[0]}. If the checkpoint's backbone was "
            "trained with its streams, take it out of the checkpoint with --backbone-out DIR."
        )


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the outputs besides the weights, with transformers' defaults filled in."""
    whole = Qwen2Config.from_dict(deepcopy(config)).to_dict()
    return {key: whole[key] for key in _COMPUTED}


def _stored(name: str, tensors: dict[str, Stored]) -> Stored | None:
    return tensors.get(EMBEDDING if name == HEAD and name not in tensors else name)  # tied


def _any(tensor: Stored) -> bool:
    return any(bool(piece.any()) for piece in tensor.pieces())


def _difference(ours: Stored | None, theirs: Stored | None) -> str:
    if ours is None or theirs is None:
        return "is missing in " + ("the checkpoint" if ours is None else "the backbone")
    if ours.shape != theirs.shape:
        return f"has shape {theirs.shape} there, {ours.shape} in the checkpoint"
    largest = difference(ours, theirs)
    return f"differs by up to {largest:.2g}" if largest else ""
