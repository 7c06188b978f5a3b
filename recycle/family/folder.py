"""A family on disk: found, read and written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from recycle.backbone.errors import BackboneError
from recycle.backbone.source import ANYONE, TOKENIZER_FILES, Access, fetched
from recycle.backbone.source import CONFIG as MODEL_CONFIG
from recycle.disk import file_sha256, write_atomically
from recycle.parscale import ParScaleConfig, cut_state, nest_states

from .record import (
    ADAPTED,
    CONFIG,
    CONTROL,
    FAMILY_FILE,
    NESTED,
    WEIGHTS,
    Family,
    FamilyError,
    check_source,
    refuse_other_methods,
    run_folders,
)

BACKBONE = "backbone"  # folder of a model whose weights learned together with the streams


class Member(NamedTuple):
    """One adapter of a family, as it will lie in memory."""

    name: str
    config: ParScaleConfig
    state: dict[str, Tensor]


def find_folder(
    source: str | Path,
    revision: str | None,
    access: Access = ANYONE,
    only: Sequence[int] | None = None,
) -> Path:
    """The local folder of `source`, a folder or a Hub id, which is downloaded.

    Args:
        source: A folder or a Hub id.
        revision: On the Hub.
        access: How the Hub is reached.
        only: The P whose adapters are needed; None is all.

    Raises:
        FamilyError: It is neither a run folder nor an adapter, lacks a P of `only`, or cannot be
            fetched.
    """
    check_source(source, only=only)
    files = ["*.json", "*.safetensors"]
    if only is not None:
        places = [ADAPTED, BACKBONE, *(f"p{p}" for p in only)]
        files = [f"{place}/{file}" for place in places for file in files]
        files += [FAMILY_FILE, CONFIG, WEIGHTS]
    try:
        return fetched(source, revision, [*files, *TOKENIZER_FILES], access)
    except BackboneError as error:
        raise FamilyError(f"{source} cannot be loaded: {error}") from None


def read_members(folder: Path, family: Family) -> list[Member]:
    """Read the adapters to have in memory, for inference. A nested family is one of them.

    Args:
        folder: Of the family.
        family: What it says of itself, or no more than some of its P (`Family.narrowed`).

    Raises:
        FamilyError: A file is missing, damaged, from another run, or holds what is not finite.
    """
    if not (folder / FAMILY_FILE).is_file():
        name = CONTROL if family.control else "default"
        member = Member(name, _read_config(folder), _read_state(folder, None))
        members = [member if family.control else _cut(member, family.p_values)]
    else:
        names = [f"p{p}" for p in sorted(family.p_values, reverse=True)]
        names += [CONTROL] if family.control else []
        members = [
            Member(
                name,
                _read_config(folder / name),
                _read_state(folder / name, family.sha256.get(f"{name}/{WEIGHTS}")),
            )
            for name in names
        ]
        _check_agreement(members, folder)
        if family.nested:
            members = _nest(members, family)
    for member in members:
        member.config.inference_mode = True
    return members


def _check_agreement(members: list[Member], folder: Path) -> None:
    """Refuse adapters of several backbones; where it lies now, each may say in its own way."""
    for field in ("backbone_dtype", "backbone_quantization", "fingerprint", "adapter_sha256"):
        recorded = {str(getattr(member.config, field)) for member in members}
        if len(recorded) > 1:
            raise FamilyError(
                f"The adapters in {folder} disagree in {field}: {sorted(recorded)}. "
                "They are of several runs; copy the whole folder of one."
            )


def _nest(members: list[Member], family: Family) -> list[Member]:
    """One adapter with the prefixes of the largest and the aggregators of all, and the control."""
    states = {member.config.num_streams: member.state for member in members}
    state = nest_states({p: states[p] for p in family.p_values})
    nested = Member(NESTED, replace(members[0].config, p_values=list(family.p_values)), state)
    return [nested, *(member for member in members if member.name == CONTROL)]


def _cut(member: Member, p_values: list[int]) -> Member:
    """What an adapter that serves several P has of some of them."""
    p, starts = p_values[-1], member.config.start_token_ids
    streams = {name: x for name, x in member.state.items() if "parscale_" in name}
    others = {name: x for name, x in member.state.items() if name not in streams}  # refused later
    state = nest_states({p: cut_state(streams, p) for p in p_values}) | others
    starts = starts and starts[:p]
    config = replace(member.config, num_streams=p, p_values=p_values, start_token_ids=starts)
    return Member(member.name, config, state)


def find_lora(folder: Path, config: ParScaleConfig) -> Path | None:
    """The folder of the LoRA that a family, or one adapter of it, stands on; None if on none.

    Raises:
        FamilyError: It is missing or damaged.
    """
    if config.adapter_sha256 is None:
        return None
    places = [place / ADAPTED for place in run_folders(folder)]
    found = next((place for place in places if (place / WEIGHTS).is_file()), None)
    if found is None or not (found / CONFIG).is_file():
        raise FamilyError(
            f"{folder} stands on a LoRA that was merged into the backbone first, and there is no "
            f"{places[0]} with its {CONFIG} and {WEIGHTS}. Copy the whole run folder again."
        )
    if file_sha256(found / WEIGHTS) != config.adapter_sha256:
        raise FamilyError(
            f"{found / WEIGHTS} is not the LoRA that the streams in {folder} were trained on (its "
            "SHA-256 differs): it is damaged, or of another run. Copy the whole run folder again."
        )
    return found


def own_backbone(folder: Path, recorded: str | None) -> Path | None:
    """The model in a family's folder that it stands on; the folder may have moved since.

    Args:
        folder: Of the family, or of one adapter of it.
        recorded: Where the backbone lay.
    """
    name = Path(recorded or "").name
    places = (place / name for place in run_folders(folder) if name in (BACKBONE, ADAPTED))
    return next((place for place in places if (place / MODEL_CONFIG).is_file()), None)


def _read_config(folder: Path) -> ParScaleConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise FamilyError(
            f"{folder / CONFIG} cannot be read as an adapter's config: {error}"
        ) from None
    refuse_other_methods(folder / CONFIG, PeftType(config.peft_type).value)
    assert isinstance(config, ParScaleConfig)
    return config


def _read_state(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if sha256 is not None and file_sha256(path) != sha256:
            raise FamilyError(
                f"{path} is not the file that {FAMILY_FILE} records (its SHA-256 differs): it is "
                "damaged, or comes from another run. Copy the whole run folder again."
            )
        state = load_file(path)
    except FileNotFoundError:
        raise FamilyError(f"{path} is missing. Copy the whole folder again.") from None
    except SafetensorError as error:
        raise FamilyError(f"{path} is damaged ({error}). Copy the whole folder again.") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise FamilyError(f"{path}: tensor {name} has values that are not finite.")
    return state


def write_adapter(folder: Path, config: ParScaleConfig, state: dict[str, Tensor]) -> None:
    """Write one plain PEFT adapter: `adapter_model.safetensors`, and `adapter_config.json` last.

    Without its config a folder is no adapter, and so a kill leaves none that is half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))
