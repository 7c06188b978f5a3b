"""A family's adapter and its backbone, written as a checkpoint of upstream's (QwenLM/ParScale)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle.backbone.source import (
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    SourceFiles,
    read_config,
)
from recycle.disk import expand
from recycle.family import Family, find_backbone, find_folder, read_members
from recycle.family.folder import Member
from recycle.family.record import listed

from .checkpoint import check_new, model_tensors, new_folder
from .layout import (
    BIASES,
    EMBEDDING,
    GENERATION,
    HEAD,
    Sizes,
    backbone_names,
    copy_files,
    first_of,
    new_shapes,
    our_name,
    to_theirs,
)
from .qwen2 import upstream_config
from .tensors import CheckpointError, Stored, difference, write_tensors

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
    by pieces from its own files, which keep their names; a Llama becomes a Qwen2 whose biases are
    zero.

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
        FamilyError: `source` is no family, or a file of it is damaged.
        CheckpointError: There is no such P; the backbone is missing, another one than the family
            was trained on, damaged, or no model that upstream's code computes; or `out` exists or
            cannot be written.

    Source: upstream's modeling_qwen2_parscale.py.
    """
    out = expand(out)
    check_new(out)
    folder = find_folder(source, revision)
    family = Family.read(folder)
    p = _chosen_p(family, p, str(source))
    member = next(m for m in read_members(folder, family) if p in (m.config.p_values or []))
    files = find_backbone(folder, member.config, str(source), backbone)
    held = model_tensors(files)
    raw = read_config(files)
    llama = raw.get("model_type") == "llama"
    config = upstream_config(raw, files.id, _dtype_name(held)) | {
        "parscale_n": p,
        "parscale_n_tokens": member.config.num_virtual_tokens,
        "parscale_attn_smooth": member.config.smoothing,
    }
    new = _stream_tensors(member, Sizes.of(config), folder)
    kept = _backbone_tensors(held, config, llama, files.id)
    with new_folder(out) as written:
        _write_weights(written, files, kept, new, llama)
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if not copy_files(files.folder, written, TOKENIZER_FILES):
            copy_files(folder, written, TOKENIZER_FILES)
        copy_files(files.folder, written, (GENERATION,))
        _name_tokenizer_class(written)
    return out


def _chosen_p(family: Family, p: int | None, source: str) -> int:
    if not family.p_values:
        raise CheckpointError(
            f"{source} is a control, one stream with a prefix, and upstream's format knows no "
            "prefix where parscale_n = 1. Export an adapter of two or more streams."
        )
    if p == 1:
        raise CheckpointError(
            "P = 1 is the untouched backbone, and there is nothing to add to it; "
            f"{source} exports with P = {listed(family.p_values)}."
        )
    if p is not None and p not in family.p_values:
        raise CheckpointError(f"{source} exports with P = {listed(family.p_values)}, got {p}.")
    return max(family.p_values) if p is None else p


def _dtype_name(held: dict[str, Stored]) -> str:
    dtype = held[EMBEDDING].dtype if EMBEDDING in held else torch.float32
    return str(dtype).removeprefix("torch.")


def _stream_tensors(member: Member, sizes: Sizes, folder: Path) -> dict[str, Tensor]:
    """The first P streams and their aggregator, under upstream's names and in its layout."""
    new = {}
    for name, shape in new_shapes(sizes).items():
        ours = our_name(name, sizes.p)
        if ours not in member.state:
            raise CheckpointError(
                f"{folder}: adapter {member.name!r} lacks tensor {ours}, which an adapter on a "
                "Qwen2 or Llama has. Copy the whole folder again."
            )
        tensor = member.state[ours]
        if "prefix_" in name:
            tensor = tensor[: sizes.p]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {ours} has shape {tuple(tensor.shape)}, and this backbone takes "
                f"{shape}. Name the backbone that it was trained on with --backbone."
            )
        new[name] = to_theirs(name, tensor, sizes.p)
    return new


def _backbone_tensors(
    held: dict[str, Stored], config: dict[str, Any], llama: bool, where: str
) -> dict[str, Stored]:
    """The backbone's tensors that are stored; a tied head and computed ones are left out."""
    kept = {n: t for n, t in held.items() if not n.endswith("rotary_emb.inv_freq")}
    if config["tie_word_embeddings"] and HEAD in kept:
        head, embedding = kept.pop(HEAD), kept[EMBEDDING]
        if head.shape != embedding.shape or difference(head, embedding):
            raise CheckpointError(
                f"{where} says that its output head is its embedding (tie_word_embeddings), and "
                f"{head.file} holds another one, {HEAD}: it is not certain which of the two "
                "upstream's code takes. Use this adapter with recycle.load."
            )
    names = backbone_names(config["num_hidden_layers"], config["tie_word_embeddings"])
    if llama:
        names = {name for name in names if not name.endswith(".bias")}
    for differing, what in ((names - kept.keys(), "lacks"), (kept.keys() - names, "also has")):
        if differing:
            raise CheckpointError(
                f"{where} {what} tensor {first_of(sorted(differing))}: it is not what its "
                "config.json says. Use this adapter with recycle.load."
            )
    return kept


def _write_weights(
    folder: Path,
    files: SourceFiles,
    kept: dict[str, Stored],
    new: dict[str, Tensor],
    llama: bool,
) -> None:
    """Write one file for each of the backbone's; a single one takes the streams as well."""
    by_file: dict[str, dict[str, Stored | Tensor]] = {}
    for name, tensor in kept.items():
        tensors = by_file.setdefault(tensor.file.name, {})
        tensors[name] = tensor
        bias = name.removesuffix("weight") + "bias"
        if llama and bias.endswith(BIASES):
            tensors[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    single = files.weights[0].name == SINGLE
    by_file.setdefault(SINGLE if single else STREAMS_FILE, {}).update(new)
    size = sum(write_tensors(folder / file, tensors) for file, tensors in by_file.items())
    if not single:
        weight_map = {name: file for file, tensors in by_file.items() for name in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _name_tokenizer_class(folder: Path) -> None:
    """Name a class that transformers 4.51 knows, where version 5 wrote its new one."""
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_bytes())
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            file.write_text(json.dumps(config, indent=2) + "\n")
