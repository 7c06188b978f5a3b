"""A further family on a live backbone, and off it again."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from recycle.backbone.fingerprint import Fingerprint, differences
from recycle.parscale import ParScaleConfig, streams_of
from recycle.parscale.layer import StreamLayer

from .adapters import load_state
from .folder import find_folder, read_members
from .model import FamilyModel
from .record import Family, FamilyError
from .switch import FIRST, families, family_of, peft_model_of


def add_family(
    model: nn.Module,
    source: str | Path,
    name: str,
    *,
    only: Sequence[int] | None = None,
    revision: str | None = None,
) -> None:
    """Put a further family on the backbone of a loaded one; what is in use stays in use.

    Its adapters are named `name/nested`, `name/p4`, …, and `set_p(model, p, family=name)` chooses
    among them. Either all of it is added or nothing. It computes in the precision that the model
    has. No other thread may run the model meanwhile.

    Args:
        model: What `recycle.load` gave, or a wrapper of it.
        source: A run folder, the folder of one adapter, or the Hub id of either.
        name: Of letters, digits, `-` and `_`. "default" is the family that was loaded first, and
            can be taken again when that is removed.
        only: As for `recycle.load`.
        revision: Revision of `source` on the Hub.

    Raises:
        FamilyError: The name is taken or none, the family cannot be read or lacks a P of `only`, or
            it stands on other weights than the families that the model has or had.
        ParScaleError: The weights in memory are not those that it was trained on.
    """
    peft_model = _family_model(model)
    taken = families(model)
    if not re.fullmatch(r"[\w-]+", name, re.ASCII) or name in taken:
        raise FamilyError(
            f"A family's name has letters, digits, - and _, and is not yet taken, got {name!r}. "
            f"On the model are {taken}."
        )
    folder = find_folder(source, revision, only=only)
    members = read_members(folder, Family.read(folder).narrowed(only, str(source)))
    _check_foundation(members[0].config, peft_model.foundation, str(source))
    prefix = "" if name == FIRST else f"{name}/"
    try:
        for member in (each._replace(name=prefix + each.name) for each in members):
            peft_model.add_adapter(member.name, member.config)
            load_state(peft_model, member, folder)
    except BaseException:
        _take_off(peft_model, [prefix + member.name for member in members])
        raise
    if not taken:
        _note(peft_model, prefix + members[0].name)
    if peft_model.foundation.fingerprint is None:
        peft_model.foundation = members[0].config


def remove_family(model: nn.Module, name: str) -> None:
    """Take a family off its backbone and free its parameters.

    If it is in use, P falls back to 1. Without any family the model is its backbone, and families
    can be added again. Neither may another thread run the model meanwhile, nor this one be inside
    a `use_p` of the family.

    Raises:
        FamilyError: The model has no family of that name.
    """
    peft_model, selection = _family_model(model), streams_of(model).selection
    if name not in families(model):
        raise FamilyError(f"The model has no family {name!r}; it has {families(model)}.")
    adapters = [adapter for adapter in selection.configs if family_of(adapter) == name]
    if set(selection.names) & set(adapters):
        selection.use(None)
        selection.adapters = []
    _take_off(peft_model, adapters)
    if not selection.adapters and selection.configs:
        _note(peft_model, next(iter(selection.configs)))


def _family_model(model: nn.Module) -> FamilyModel:
    found = peft_model_of(model)
    if not isinstance(found, FamilyModel):
        raise FamilyError(
            f"Families are added to a model that recycle.load gave, got a {type(model).__name__}."
        )
    return found


def _check_foundation(config: ParScaleConfig, ours: ParScaleConfig, source: str) -> None:
    """Refuse a family that stands on other weights; one that PEFT wrote does not say."""
    if ours.fingerprint is None or config.fingerprint is None:
        return
    mine, theirs = (Fingerprint.from_dict(x.fingerprint or {}) for x in (ours, config))
    differing = differences(mine, theirs)
    if config.adapter_sha256 != ours.adapter_sha256:
        loras = [(each.adapter_sha256 or "none")[:12] for each in (ours, config)]
        differing.append("the LoRA ({} here, {} there, by SHA-256)".format(*loras))
    if differing:
        raise FamilyError(
            f"{source} stands on other weights than this model has: on {theirs.id} in place of "
            f"{mine.id}, and different are {'; '.join(differing)}. Load it on its own: "
            f"recycle.load({source!r})."
        )


def _note(model: FamilyModel, adapter: str) -> None:
    """Let what PEFT notes as active exist, while P is 1."""
    model.active_adapter = model.base_model.active_adapter = adapter
    streams_of(model).selection.adapters = [adapter]


def _take_off(model: FamilyModel, adapters: Sequence[str]) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, StreamLayer)]
    for adapter in adapters:
        model.peft_config.pop(adapter, None)
        for layer in layers:
            layer.delete_adapter(adapter)
