"""Upstream's checkpoints (QwenLM/ParScale): a checkpoint in, an adapter and its backbone out.

The names and layout of the tensors are in `layout.py`, the way back is in `exporter.py`.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from recycle.backbone.fingerprint import fingerprint_model
from recycle.backbone.source import TOKENIZER_FILES, read_config, source_files
from recycle.disk import expand
from recycle.family.folder import BACKBONE, write_adapter
from recycle.parscale.config import ParScaleConfig

from .checkpoint import GENERATION, Checkpoint, check_new, copy_files, new_folder, write_model
from .layout import (
    BIASES,
    EMBEDDING,
    HEAD,
    check_tensors,
    new_shapes,
    our_name,
    qwen2_shapes,
    to_ours,
    whole_config,
)
from .qwen2 import upstream_config
from .tensors import CheckpointError, Stored, difference, model_tensors

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
    turned into a plain Qwen2 model at `backbone_out`, or `out`. Files are mapped, not held.

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
        BackboneError: A file of the checkpoint or of `backbone` is missing or damaged.
        CheckpointError: See `Checkpoint`; or a tensor is missing or has values that are not finite;
            or `backbone` is another model; or a folder exists or cannot be written.
    """
    if backbone is not None and backbone_out is not None:
        raise CheckpointError("Name either the backbone or where to write it, not both.")
    out = expand(out)
    plain_out = out / BACKBONE if backbone_out is None else expand(backbone_out)
    for path in (out, plain_out):
        check_new(path)
    here, there = out.resolve(), plain_out.resolve()
    inside = there == here / BACKBONE  # the default, written with the adapter
    if not inside and (there.is_relative_to(here) or here.is_relative_to(there)):
        raise CheckpointError(
            f"The backbone goes beside the adapter's folder {out}, or to {out / BACKBONE}, got "
            f"{plain_out}."
        )
    checkpoint = Checkpoint.open(source, revision)
    shapes = new_shapes(checkpoint.config)
    what = f"a Qwen2 model with parscale_n = {checkpoint.config['parscale_n']}"
    if shapes:
        what += f" and parscale_n_tokens = {checkpoint.config['parscale_n_tokens']}"
    check_tensors(
        checkpoint.tensors,
        qwen2_shapes(checkpoint.config, checkpoint.tensors) | shapes,
        str(checkpoint.folder),
        what,
        "Fetch the checkpoint again.",
    )
    if backbone is not None:
        _compare_backbone(checkpoint, backbone)
    if not shapes:  # one stream
        if backbone is not None:
            return None
        target = out if inside else plain_out
        with new_folder(target) as plain:
            _write_backbone(checkpoint, plain)
        return target
    config, state = _adapter(checkpoint)
    with (
        new_folder(out) as adapter,
        nullcontext(adapter / BACKBONE) if inside else new_folder(plain_out) as plain,
    ):
        if backbone is not None:
            identity = fingerprint_model(backbone)
        else:
            _write_backbone(checkpoint, plain)
            config.backbone_trained = True
            identity = replace(fingerprint_model(plain), id=str(there))
        config.base_model_name_or_path = identity.id
        config.revision = identity.revision
        config.fingerprint = identity.to_dict()
        write_adapter(adapter, config, state)
        copy_files(checkpoint.folder, adapter, TOKENIZER_FILES)
    return out


def _adapter(checkpoint: Checkpoint) -> tuple[ParScaleConfig, dict[str, Tensor]]:
    raw, shapes = checkpoint.config, new_shapes(checkpoint.config)
    p = raw["parscale_n"]
    config = ParScaleConfig(
        num_streams=p,
        num_virtual_tokens=raw["parscale_n_tokens"],
        smoothing=raw["parscale_attn_smooth"],
        init="random",
        decoder="model",
        hidden_size=raw["hidden_size"],
        attention_shapes={
            name.removesuffix(".prefix_k"): [shape[1], shape[3], shape[3]]
            for name, shape in shapes.items()
            if name.endswith(".prefix_k")
        },
        backbone_dtype=raw.get("torch_dtype", raw.get("dtype")),
        inference_mode=True,
    )
    return config, {
        our_name(name, p): to_ours(name, checkpoint.tensors[name].read(), p) for name in shapes
    }


def _write_backbone(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's backbone as a plain Qwen2 folder, one file for each of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        key: value
        for key, value in checkpoint.config.items()
        if not key.startswith("parscale_") and key != "auto_map"
    }
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    new = new_shapes(checkpoint.config)
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in new}
    write_model(folder, config, kept, {name: tensor.file.name for name, tensor in kept.items()})
    copy_files(checkpoint.folder, folder, (*TOKENIZER_FILES, GENERATION))


def _compare_backbone(checkpoint: Checkpoint, backbone: str) -> None:
    """Check by config, shapes and weights that `backbone` is the model inside the checkpoint.

    Weights of two precisions are compared in the lower one. A Llama is a Qwen2 with biases of zero.

    Raises:
        CheckpointError: It is another model; says in what, by how many tensors and which is the
            first.
    """
    files = source_files(backbone)
    config = read_config(files)
    llama = config.get("model_type") == "llama"
    if llama:
        config = upstream_config(config, backbone)
    ours, theirs = whole_config(checkpoint.config).to_dict(), whole_config(config).to_dict()
    other = [
        f"{key} is {theirs[key]} there, {ours[key]} in the checkpoint"
        for key in _COMPUTED
        if ours[key] != theirs[key]
    ]
    if other:
        raise CheckpointError(
            f"{backbone} is not the model inside {checkpoint.folder}: in config.json, "
            f"{'; '.join(other)}."
        )
    held = model_tensors(files)
    names = (checkpoint.tensors.keys() | held.keys()) - new_shapes(checkpoint.config).keys()
    wrong = []
    for name in sorted(names):
        mine, other_one = _stored(name, checkpoint.tensors), _stored(name, held)
        if llama and mine and not other_one and name.endswith(BIASES):
            differing = "is not zero, as a Llama has it" if mine.read().any() else ""
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


def _stored(name: str, tensors: dict[str, Stored]) -> Stored | None:
    return tensors.get(EMBEDDING if name == HEAD and name not in tensors else name)  # tied


def _difference(ours: Stored | None, theirs: Stored | None) -> str:
    if ours is None or theirs is None:
        return "is missing in " + ("the checkpoint" if ours is None else "the backbone")
    if ours.shape != theirs.shape:
        return f"has shape {theirs.shape} there, {ours.shape} in the checkpoint"
    largest = difference(ours, theirs)
    return f"differs by up to {largest:.2g}" if largest else ""
