"""The model that streams stand on, written as an ordinary checkpoint of transformers."""

from pathlib import Path

from recycle.backbone import load_model
from recycle.backbone.lora import put_lora
from recycle.backbone.source import TOKENIZER_FILES, SourceFiles, source_files
from recycle.disk import expand
from recycle.family import Family
from recycle.family.adapters import find_backbone
from recycle.family.folder import find_folder, find_lora, read_members

from .checkpoint import check_new, copy_files, new_folder


def export_adapted(
    source: str | Path, out: str | Path, *, backbone: str | Path | None = None
) -> Path:
    """Write the adapted model of a run, P = 1, as a plain model folder.

    Args:
        source: A run folder, the folder of one adapter, or the Hub id of either.
        out: The model's folder; must not exist.
        backbone: Where the backbone lies now, if not where the adapters recorded it.

    Raises:
        FamilyError: `source` is no family, or its P = 1 is the untouched backbone, or it has none.
        BackboneError: The backbone, or the LoRA, cannot be loaded.
        CheckpointError: `out` exists or cannot be written.
    """
    out = expand(out)
    check_new(out)
    folder = find_folder(source, None)
    family = Family.read(folder)
    family.exported_p(1, str(source), folder)
    config = read_members(folder, family)[0].config
    lora = find_lora(folder, config)
    files = find_backbone(folder, config, str(source), backbone)
    with new_folder(out) as written:
        write_merged(files, lora, config.backbone_dtype, written)
        copy_files(folder, written, TOKENIZER_FILES)
    return out


def write_merged(
    files: SourceFiles, lora: Path | None, dtype: str | None, folder: Path
) -> SourceFiles:
    """Write a backbone with a LoRA merged into its weights, unquantised; its files in `folder`."""
    model = load_model(files, dtype)
    model = model if lora is None else put_lora(model, lora)
    model.save_pretrained(folder)
    copy_files(files.folder, folder, TOKENIZER_FILES)
    return source_files(folder)
