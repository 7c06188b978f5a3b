"""A family on disk: a run folder with `p2/`, `p4/`, …, perhaps `control/`, and `family.json`.

Each of them is a plain PEFT adapter that stands on its own. `family.json` holds what they share.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recycle.backbone.source import ANYONE, Access
from recycle.disk import file_sha256
from recycle.errors import RecycleError
from recycle.parscale.config import ParScaleConfig

FAMILY_FILE = "family.json"
FAMILY_VERSION = 1
NESTED = "nested"
CONTROL = "control"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BACKBONE = "backbone"  # folder of an imported adapter that brings its own


class FamilyError(RecycleError):
    """A family folder cannot be loaded, or does not have the P that was asked for."""


class Member(NamedTuple):
    """One adapter of a family, as it will lie in memory."""

    name: str
    config: ParScaleConfig
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What the adapters of a run folder share: the content of `family.json`."""

    p_values: list[int]
    nested: bool
    control: bool
    backbone: str
    revision: str | None
    backbone_trained: bool
    sha256: dict[str, str]  # of each weight file, by its path in the folder
    version: int = FAMILY_VERSION

    @staticmethod
    def read(folder: Path) -> "Family":
        """Read `family.json`; a folder that is one adapter is a family of its own."""
        path = folder / FAMILY_FILE
        if path.is_file():
            return _parse(path)
        config = _read_config(folder)
        return Family(
            p_values=[p for p in config.p_values or [] if p > 1],
            nested=len(config.p_values or []) > 1,
            control=config.num_streams == 1,
            backbone=config.base_model_name_or_path or "",
            revision=config.revision,
            backbone_trained=config.backbone_trained,
            sha256={},
        )

    def write(self, folder: Path) -> None:
        """Write `family.json`. It comes last: it makes the folder a whole family."""
        (folder / FAMILY_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def _parse(path: Path) -> Family:
    try:
        content = json.loads(path.read_text())
        version = content.get("version")
        if version == FAMILY_VERSION:
            return Family(**content)
    except (ValueError, TypeError, AttributeError) as error:
        raise FamilyError(f"{path} is torn or no family file: {error}. Copy it again.") from None
    raise FamilyError(
        f"{path} has version {version}, this recycle reads version {FAMILY_VERSION}. "
        "Upgrade recycle-lm."
    )


def find_folder(source: str | Path, revision: str | None, access: Access = ANYONE) -> Path:
    """The local folder of `source`, a folder or a Hub id, which is downloaded.

    Raises:
        FamilyError: It is neither a run folder nor an adapter, or cannot be fetched.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and revision is not None:
        raise FamilyError(
            f"A revision belongs to a Hub id, and {folder} is a folder: leave out the revision "
            f"({revision!r})."
        )
    if folder.is_dir():
        if not (folder / FAMILY_FILE).is_file() and not (folder / CONFIG).is_file():
            raise FamilyError(
                f"{folder} holds neither {FAMILY_FILE} (a run folder) nor {CONFIG} (one adapter). "
                "A run writes them when its training is finished."
            )
        return folder
    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=patterns, **access)
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FamilyError(
            f"{str(source)!r} is no folder here, and as a Hub id it could not be fetched: "
            f"{str(error).splitlines()[0]}"
        ) from None


def read_members(folder: Path, family: Family) -> list[Member]:
    """Read the adapters to have in memory, for inference. A nested family is one of them.

    Raises:
        FamilyError: A file is missing, torn, from another run or holds values that are not finite.
    """
    if not (folder / FAMILY_FILE).is_file():
        name = CONTROL if family.control else "default"
        members = [Member(name, _read_config(folder), _read_state(folder, None))]
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
        if family.nested:
            members = _nest(members, family)
    for member in members:
        member.config.inference_mode = True
    return members


def _nest(members: list[Member], family: Family) -> list[Member]:
    """One adapter with the prefixes of the largest and the aggregators of all, and the control."""
    largest, *others = members
    state = largest.state
    for member in others:
        if member.name != CONTROL:
            state |= {k: tensor for k, tensor in member.state.items() if "aggregator" in k}
    config = replace(largest.config, p_values=list(family.p_values))
    nested = Member(NESTED, config, state)
    return [nested, *(member for member in others if member.name == CONTROL)]


def _read_config(folder: Path) -> ParScaleConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise FamilyError(
            f"{folder / CONFIG} cannot be read as an adapter's config: {error}"
        ) from None
    if not isinstance(config, ParScaleConfig):
        raise FamilyError(
            f"{folder / CONFIG} is a {PeftType(config.peft_type).value} adapter; recycle loads "
            "ParScale adapters. Load it with peft.PeftModel.from_pretrained."
        )
    return config


def _read_state(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if sha256 is not None and file_sha256(path) != sha256:
            raise FamilyError(
                f"{path} is not the file that {FAMILY_FILE} records (its SHA-256 differs): it is "
                "torn, or comes from another run. Copy the whole run folder again."
            )
        state = load_file(path)
    except FileNotFoundError:
        raise FamilyError(f"{path} is missing. Copy the whole folder again.") from None
    except SafetensorError as error:
        raise FamilyError(f"{path} is torn ({error}). Copy the whole folder again.") from None
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise FamilyError(f"{path}: tensor {name} has values that are not finite.")
    return state


def write_adapter(folder: Path, config: ParScaleConfig, state: dict[str, Tensor]) -> None:
    """Write one plain PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
