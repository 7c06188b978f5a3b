"""Adapters of several P on one backbone: load and save.

In memory a nested family is one adapter that serves all of them, and an independent family
is one adapter for each P. How it lies on disk is in `folder.py`, and how P is chosen in
`switch.py`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from recycle.backbone.fingerprint import Fingerprint, SourceError, differences, fingerprint
from recycle.backbone.source import Access
from recycle.disk import file_sha256
from recycle.parscale.config import ParScaleConfig

from .folder import (
    BACKBONE,
    CONFIG,
    CONTROL,
    FAMILY_FILE,
    NESTED,
    WEIGHTS,
    Family,
    FamilyError,
    Member,
    find_folder,
    read_members,
    write_adapter,
)
from .switch import listed, parscale_configs, set_p

__all__ = [
    "CONTROL",
    "FAMILY_FILE",
    "NESTED",
    "Family",
    "FamilyError",
    "attach",
    "load",
    "member_state",
    "save_family",
    "write_adapter",
]

ACCESS = tuple(Access.__annotations__)


def load(
    source: str | Path,
    p: int | None = None,
    *,
    backbone: str | Path | None = None,
    revision: str | None = None,
    **backbone_options: Any,
) -> PeftModelForCausalLM:
    """Load a backbone with its whole family of adapters.

    Args:
        source: A run folder, the folder of one adapter, or the Hub id of either.
        p: Streams in use first; the largest where not given. 1 is the untouched backbone.
        backbone: Where the backbone lies now, if not where the adapters recorded it: folder or Hub
            id.
        revision: Revision of `source` on the Hub.
        backbone_options: Go to the backbone's `from_pretrained`: dtype, device_map,
            quantization_config, attn_implementation, … `token`, `cache_dir` and `local_files_only`
            hold for `source` as well.

    Returns:
        A PEFT model in eval mode. `set_p` switches it; an adapter named "control", where the family
        has one, is reached with `model.set_adapter("control")`.

    Raises:
        FamilyError: The folder holds no family, a file of it is torn, it lacks `p`, or the backbone
            is missing or another one than the family was trained on. An adapter that PEFT's
            `save_pretrained` wrote has no fingerprint: of its backbone only the shapes are checked.
    """
    refused = sorted({"trust_remote_code", "use_safetensors"} & set(backbone_options))
    if refused:
        raise FamilyError(
            "recycle.load reads safetensors only and runs no code from a model's repository; leave "
            f"out {' and '.join(refused)}."
        )
    access: Any = {key: backbone_options[key] for key in ACCESS if key in backbone_options}
    folder = find_folder(source, revision, access)
    family = Family.read(folder)
    offered = ([] if family.backbone_trained else [1]) + family.p_values
    if p is not None and (type(p) is not int or p not in offered):
        raise FamilyError(f"{source} offers P = {listed(offered)}, got p={p!r}.")
    members = read_members(folder, family)
    location, backbone_revision = family.backbone, family.revision
    if backbone is not None:
        location, backbone_revision = str(Path(backbone).expanduser()), None
    elif (folder / BACKBONE).is_dir():  # imported with it; the folder may have moved since
        location = str(folder / BACKBONE)
    _check_backbone(members[0].config, location, backbone_revision, str(source), access)

    model = AutoModelForCausalLM.from_pretrained(
        location,
        revision=backbone_revision or "main",
        trust_remote_code=False,
        use_safetensors=True,
        adapter_kwargs=access,  # the same place is asked whether it is an adapter
        **backbone_options,
    )
    peft_model = attach(model, members, folder)
    if p is not None or family.p_values:
        set_p(peft_model, max(offered) if p is None else p)
    return peft_model


def attach(model: PreTrainedModel, members: list[Member], folder: Path) -> PeftModelForCausalLM:
    """Put a family's adapters, as `read_members` gives them, on a backbone that is loaded."""
    first, *others = members
    peft_model = PeftModelForCausalLM(model, first.config, adapter_name=first.name)
    for member in others:
        peft_model.add_adapter(member.name, member.config)
    for member in members:
        _load_state(peft_model, member, folder)
    return peft_model.eval()


def _adapter_state(model: PeftModelForCausalLM, adapter: str) -> dict[str, Tensor]:
    # Told nothing about embeddings, PEFT looks for the backbone's config on the Hub.
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def member_state(model: PeftModelForCausalLM, adapter: str, p: int) -> dict[str, Tensor]:
    """The tensors of an adapter's first `p` streams, as a plain adapter with P = `p` holds them."""
    state = {}
    for name, tensor in _adapter_state(model, adapter).items():
        leaf = name.rpartition(".")[2]
        if leaf in ("parscale_keys", "parscale_values"):
            state[name] = tensor[:p].detach().cpu().contiguous()
        elif leaf.startswith(f"p{p}_"):
            state[name] = tensor.detach().cpu().contiguous()
    return state


def save_family(model: PeftModelForCausalLM, folder: Path, backbone: Fingerprint) -> Family:
    """Write every adapter of the model below `folder` and `family.json`, which makes it a family.

    Args:
        model: A PEFT model with the adapter "nested", or one adapter for each P, and perhaps
            "control".
        folder: An existing folder.
        backbone: Fingerprint of the source that the backbone was loaded from.
    """
    sha256 = {}
    p_values: list[int] = []
    configs = parscale_configs(model)
    shared: dict[str, Any] = {
        "fingerprint": backbone.to_dict(),
        "base_model_name_or_path": backbone.id,
        "revision": backbone.revision,
        "inference_mode": True,
    }
    for adapter, config in configs.items():
        for p in config.p_values or []:
            name = CONTROL if p == 1 else f"p{p}"
            starts = config.start_token_ids and config.start_token_ids[:p]
            member = replace(config, num_streams=p, p_values=[p], start_token_ids=starts, **shared)
            write_adapter(folder / name, member, member_state(model, adapter, p))
            sha256[f"{name}/{WEIGHTS}"] = file_sha256(folder / name / WEIGHTS)
            p_values += [p] if p > 1 else []
    family = Family(
        p_values=sorted(p_values),
        nested=NESTED in configs,
        control=CONTROL in configs,
        backbone=backbone.id,
        revision=backbone.revision,
        backbone_trained=any(config.backbone_trained for config in configs.values()),
        sha256=sha256,
    )
    family.write(folder)
    return family


def _load_state(model: PeftModelForCausalLM, member: Member, folder: Path) -> None:
    expected = _adapter_state(model, member.name)
    wrong = sorted(set(expected) ^ set(member.state)) or [
        name for name in expected if expected[name].shape != member.state[name].shape
    ]
    if wrong:
        raise FamilyError(
            f"{folder}: the weights of adapter {member.name!r} do not fit its config; {len(wrong)} "
            f"tensors differ, first {wrong[0]}."
        )
    set_peft_model_state_dict(model, member.state, adapter_name=member.name)


def _check_backbone(
    config: ParScaleConfig, location: str, revision: str | None, source: str, access: Access
) -> None:
    if not location:
        raise FamilyError(
            f"{source} does not record its backbone. Name it: "
            f"recycle.load({source!r}, backbone=...)."
        )
    if config.fingerprint is None:
        return
    try:
        trained_on = Fingerprint.from_dict(config.fingerprint)
    except TypeError as error:
        raise FamilyError(
            f"{source}: the fingerprint in {CONFIG} is torn ({error}). Copy the whole folder again."
        ) from None
    try:
        differing = differences(trained_on, fingerprint(location, revision, access))
    except SourceError as error:
        raise FamilyError(
            f"{source} was trained on the backbone {trained_on.id}, which cannot be read: {error}. "
            "Pass where that backbone lies: recycle.load(..., backbone=...)."
        ) from None
    if differing:
        raise FamilyError(
            f"{source} was trained on the backbone {trained_on.id} (revision "
            f"{trained_on.revision}), and {location} is another one: {'; '.join(differing)}. Pass "
            "where that backbone lies: recycle.load(..., backbone=...)."
        )
