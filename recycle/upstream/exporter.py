"""A family's adapter and its backbone, written as a checkpoint of upstream's (QwenLM/ParScale)."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle.backbone.source import SINGLE, TOKENIZER_FILES, SourceFiles, read_config
from recycle.disk import expand
from recycle.family import Family
from recycle.family.adapters import find_backbone
from recycle.family.folder import Member, find_folder, find_lora, read_members

from .adapted import write_merged
from .checkpoint import GENERATION, check_new, copy_files, new_folder, write_model
from .layout import (
    BIASES,
    EMBEDDING,
    HEAD,
    check_tensors,
    new_shapes,
    our_name,
    qwen2_shapes,
    to_theirs,
)
from .qwen2 import upstream_config
from .tensors import CheckpointError, Stored, difference, model_tensors

STREAMS_FILE = "model-parscale.safetensors"  # beside the shards of a backbone that has several


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    p: int | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint that upstream's code loads; `import_checkpoint` gives the adapter back.

    Tensors of the streams are float32, whatever the backbone's precision. The backbone's are copied
    from its own files, which keep their names, or merged with the LoRA of the run; a Llama becomes
    a Qwen2 whose biases are zero.

    Args:
        source: A run folder, the folder of one adapter, or the Hub id of either.
        out: The checkpoint's folder; must not exist.
        p: Which P of the family, the largest where not given. Of a nested family it is the first
            `p` streams.
        backbone: Where the backbone lies now, if not where the adapters recorded it: folder or Hub
            id.
        revision: Of `source` on the Hub.

    Returns:
        The checkpoint's folder.

    Raises:
        FamilyError: `source` is no family, a file of it is damaged, or there is no such P. Or the
            backbone is missing, or another one than the family was trained on.
        BackboneError: A file of the backbone is damaged.
        CheckpointError: The backbone is no model that upstream's code computes; or `out` exists or
            cannot be written.

    Source: upstream's modeling_qwen2_parscale.py.
    """
    out = expand(out)
    check_new(out)
    folder = find_folder(source, revision)
    family = Family.read(folder)
    p = family.exported_p(p, str(source), folder)
    member = next(m for m in read_members(folder, family) if p in (m.config.p_values or []))
    files = find_backbone(folder, member.config, str(source), backbone)
    lora = find_lora(folder, member.config)
    if lora is not None:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent) as merged:
            dtype = member.config.backbone_dtype
            files = write_merged(files, lora, dtype, Path(merged))
            return _export(files, member, p, folder, out)
    return _export(files, member, p, folder, out)


def _export(files: SourceFiles, member: Member, p: int, folder: Path, out: Path) -> Path:
    raw = read_config(files)
    config = upstream_config(raw, files.id)
    llama = raw["model_type"] == "llama"
    kept = _backbone_tensors(model_tensors(files), config, llama, files.id)
    dtype = str(kept[EMBEDDING].mapped().dtype).removeprefix("torch.")
    config |= {
        "torch_dtype": config["torch_dtype"] or dtype,
        "parscale_n": p,
        "parscale_n_tokens": member.config.num_virtual_tokens,
        "parscale_attn_smooth": member.config.smoothing,
    }
    tensors: dict[str, Stored | Tensor] = {**kept}
    weight_map = {name: tensor.file.name for name, tensor in kept.items()}
    for name, tensor in kept.items():
        bias = name.removesuffix("weight") + "bias"
        if llama and bias.endswith(BIASES):
            tensors[bias] = torch.zeros_like(tensor.mapped()[:, 0])
            weight_map[bias] = tensor.file.name
    new = _stream_tensors(member, config, folder)
    weight_map |= dict.fromkeys(new, SINGLE if SINGLE in weight_map.values() else STREAMS_FILE)
    with new_folder(out) as written:
        write_model(written, config, tensors | new, weight_map)
        if not copy_files(files.folder, written, TOKENIZER_FILES):
            copy_files(folder, written, TOKENIZER_FILES)
        copy_files(files.folder, written, (GENERATION,))
        _name_tokenizer_class(written)
    return out


def _stream_tensors(member: Member, config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The first P streams and their aggregator, under upstream's names and in its layout."""
    p, new = config["parscale_n"], {}
    for name, shape in new_shapes(config).items():
        ours = our_name(name, p)
        if ours not in member.state:
            raise CheckpointError(
                f"{folder}: adapter {member.name!r} lacks tensor {ours}, which an adapter on a "
                "Qwen2 or Llama has. Copy the whole folder again."
            )
        tensor = member.state[ours]
        if "prefix_" in name:
            tensor = tensor[:p]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {ours} has shape {tuple(tensor.shape)}, and this backbone takes "
                f"{shape}. Name the backbone that it was trained on with --backbone."
            )
        new[name] = to_theirs(name, tensor, p)
    return new


def _backbone_tensors(
    held: dict[str, Stored], config: dict[str, Any], llama: bool, where: str
) -> dict[str, Stored]:
    """The backbone's tensors, checked; a tied head is left out."""
    shapes = qwen2_shapes(config, held)
    if llama:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(BIASES)}
    what = "the Llama model" if llama else "the Qwen2 model"
    check_tensors(held, shapes, where, what, "Use this adapter with recycle.load.")
    if not config["tie_word_embeddings"] or HEAD not in held:
        return held
    head, embedding = held.pop(HEAD), held[EMBEDDING]
    if difference(head, embedding):
        raise CheckpointError(
            f"{where} says that its output head is its embedding (tie_word_embeddings), and "
            f"{head.file} holds another one, {HEAD}: it is not certain which of the two "
            "upstream's code takes. Use this adapter with recycle.load."
        )
    return held


def _name_tokenizer_class(folder: Path) -> None:
    """Name a class that transformers 4.51 knows, where version 5 wrote its new one."""
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_bytes())
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            file.write_text(json.dumps(config, indent=2) + "\n")
