"""What a family's folder says of itself: `family.json`, or one adapter's config.

A run folder holds `p2/`, `p4/`, …, perhaps `control/`, each a plain PEFT adapter, `adapted/` (a
plain LoRA or a whole model) where a first stage adapted the weights that they stand on, and
`family.json` with what they share. It has no path in it, since run folders are published;
where the backbone lies is in each adapter's own `adapter_config.json`, where PEFT looks for it.

This file imports nothing heavy, so that a wrong folder or P is told at once.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recycle.disk import expand, read_json_object, write_atomically
from recycle.errors import RecycleError

FAMILY_FILE = "family.json"
FAMILY_VERSION = 2
NESTED = "nested"
CONTROL = "control"
ADAPTED = "adapted"  # folder of the weights that the streams stand on, in a run's folder
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class FamilyError(RecycleError):
    """A family folder cannot be loaded, or does not have the P that was asked for."""


@dataclass(frozen=True)
class Family:
    """What the adapters of a run folder share: the content of `family.json`."""

    p_values: list[int]
    nested: bool
    control: bool
    backbone_trained: bool
    sha256: dict[str, str]  # of each weight file, by its path in the folder
    version: int = FAMILY_VERSION

    @property
    def offered(self) -> list[int]:
        """The P that it can run with; 1 is the model that the streams stand on."""
        return ([] if self.backbone_trained else [1]) + self.p_values

    @staticmethod
    def read(folder: Path) -> "Family":
        """Read a local folder's `family.json`; a folder that is one adapter is a family of its own.

        Raises:
            FamilyError: It is neither, or what it holds cannot be read.
        """
        if (folder / FAMILY_FILE).is_file():
            return _parse(folder / FAMILY_FILE)
        if not (folder / CONFIG).is_file():
            raise FamilyError(_what_is_there(folder))
        config = read_json_object(folder / CONFIG, FamilyError)
        refuse_other_methods(folder / CONFIG, config.get("peft_type"))
        p_values = config.get("p_values") or [config.get("num_streams", 1)]
        return Family(
            p_values=[p for p in p_values if p > 1],
            nested=len(p_values) > 1,
            control=p_values == [1],
            backbone_trained=bool(config.get("backbone_trained")),
            sha256={},
        )

    def write(self, folder: Path) -> None:
        """Write `family.json`. It comes last: it makes the folder a whole family."""
        write_atomically(folder / FAMILY_FILE, f"{json.dumps(asdict(self), indent=2)}\n".encode())

    def narrowed(self, only: Sequence[int] | None, source: str) -> "Family":
        """The family with no more than some of its P, and without the control; None is all of it.

        Args:
            only: Values of P; 1 may be among them, and is offered in any case.
            source: What the family is called in errors.

        Raises:
            FamilyError: It does not offer them, there is none above 1, or it is no list.
        """
        if only is None:
            return self
        _check_list(only)
        kept = {p for p in only if p != 1}
        if not kept or any(type(p) is not int or p not in self.offered for p in only):
            raise FamilyError(
                f"only= takes values of P that {source} offers ({listed(self.offered)}), at least "
                f"one of them above 1, got only={list(only)}. P = 1 alone needs no adapter: load "
                "the backbone with transformers' AutoModelForCausalLM.from_pretrained, and put "
                f"{ADAPTED}/ on it with peft.PeftModel.from_pretrained where the run has one."
            )
        return replace(self, p_values=sorted(kept), control=False)

    def check(self, p: int | None, source: str, only: Sequence[int] | None = None) -> None:
        """Refuse a P that the family does not offer.

        Raises:
            FamilyError: Names those that it does.
        """
        if p is not None and (type(p) is not int or p not in self.offered):
            kept = "" if only is None else f" with only={list(only)}"
            raise FamilyError(f"{source}{kept} offers P = {listed(self.offered)}, got p={p!r}.")

    def exported_p(self, p: int | None, source: str, folder: Path) -> int:
        """Which P a checkpoint is made of: `p`, or else the largest.

        Args:
            p: As asked for.
            source: What the family is called in errors.
            folder: Where it lies.

        Raises:
            FamilyError: Upstream's format does not know it, or the family does not offer it.
        """
        if not self.p_values:
            raise FamilyError(
                f"{source} is a control, one stream with a prefix, and upstream's format knows no "
                "prefix where parscale_n = 1. Export an adapter of two or more streams."
            )
        adapted = any((place / ADAPTED).is_dir() for place in run_folders(folder))
        exported = ([1] if adapted and not self.backbone_trained else []) + self.p_values
        if p == 1 and p not in exported:
            raise FamilyError(
                "P = 1 is the untouched backbone, and there is nothing to add to it; "
                f"{source} exports with P = {listed(exported)}."
            )
        if p is not None and p not in exported:
            raise FamilyError(f"{source} exports with P = {listed(exported)}, got {p}.")
        return max(self.p_values) if p is None else p


def run_folders(folder: Path) -> list[Path]:
    """Where the weights that a family stands on may lie: in it or, for one adapter, above it."""
    return [folder] if (folder / FAMILY_FILE).is_file() else [folder, folder.parent]


def listed(offered: Sequence[int]) -> str:
    """Values of P in words."""
    return ", ".join(map(str, offered)) or "nothing but its one-stream adapter"


def refuse_other_methods(path: Path, peft_type: str | None) -> None:
    """Raise `FamilyError` where an adapter's config is not of ParScale."""
    if peft_type != "PARSCALE":
        raise FamilyError(
            f"{path} is a {peft_type} adapter; recycle loads ParScale adapters. Load it with "
            "peft.PeftModel.from_pretrained."
        )


def check_source(
    source: str | Path, p: int | None = None, only: Sequence[int] | None = None
) -> Family | None:
    """Refuse what a folder's JSON files alone show to be wrong; None of a Hub id, which passes.

    Raises:
        FamilyError: The folder is no family, or does not offer `p` or all of `only`.
    """
    folder = expand(source)
    if folder.is_dir():
        family = Family.read(folder).narrowed(only, str(source))
        family.check(p, str(source), only)
        return family
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FamilyError(f"{str(source)!r} is no folder here. Name a run folder or a Hub id.")
    _check_list(only)
    return None


def _check_list(only: Sequence[int] | None) -> None:
    if only is not None and not isinstance(only, Iterable):
        raise FamilyError(f"only= takes a list of values of P, such as [4], got only={only!r}.")


def _what_is_there(folder: Path) -> str:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    words = f"{folder} holds neither {FAMILY_FILE} (a run folder) nor {CONFIG} (one adapter). "
    if inside:
        return (
            f"{words}It has adapters in {', '.join(f'{name}/' for name in inside)}, as PEFT's "
            f"save_pretrained writes them: name one, such as {folder / inside[0]}."
        )
    return f"{words}A run writes them when its training is finished."


def _parse(path: Path) -> Family:
    content = read_json_object(path, FamilyError)
    version = content.get("version")
    if version != FAMILY_VERSION:
        raise FamilyError(
            f"{path} has version {version}, this recycle reads version {FAMILY_VERSION}. Use the "
            "recycle-lm that wrote it, or run the recipe again."
        )
    try:
        return Family(**content)
    except TypeError as error:
        raise FamilyError(f"{path} is damaged: {error}. Copy it again.") from None
