"""Adapters of several P on one backbone: load, switch, save.

In memory a nested family is one adapter whose heads are the values of P, and an independent family
is one adapter for each P. How it lies on disk is in `folder.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import ParScaleConfig
from .fingerprint import Fingerprint, SourceError, differences, fingerprint
from .folder import (
    CONTROL,
    FAMILY_FILE,
    NESTED,
    WEIGHTS,
    Family,
    FamilyError,
    Member,
    file_sha256,
    find_folder,
    read_members,
    write_adapter,
)
from .prefix import ActiveStreams, StreamLayer
from .streams import DecoderStreams, choose_streams

__all__ = [
    "CONTROL",
    "FAMILY_FILE",
    "NESTED",
    "Family",
    "FamilyError",
    "attach",
    "available_p",
    "get_p",
    "load",
    "member_state",
    "save_family",
    "set_p",
    "use_p",
    "write_adapter",
]


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
            quantization_config, attn_implementation, …

    Returns:
        A PEFT model in eval mode. `set_p` switches it; an adapter named "control", where the family
        has one, is reached with `model.set_adapter("control")`.

    Raises:
        FamilyError: The folder holds no family, a file of it is torn, it lacks `p`, or the backbone
            is missing or another one than the family was trained on.
    """
    folder = find_folder(source, revision)
    family = Family.read(folder)
    offered = ([] if family.backbone_trained else [1]) + family.streams
    if p is not None and p not in offered:
        raise FamilyError(f"{source} offers P = {_listed(offered)}, got p={p}.")
    members = read_members(folder, family)
    location = str(backbone or family.backbone)
    backbone_revision = None if backbone else family.revision
    _check_backbone(members[0].config, location, backbone_revision, str(source))

    model = AutoModelForCausalLM.from_pretrained(
        location,
        revision=backbone_revision or "main",
        trust_remote_code=False,
        use_safetensors=True,
        **backbone_options,
    )
    peft_model = attach(model, members, folder)
    if p is not None or family.streams:
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


def available_p(model: nn.Module) -> list[int]:
    """The values of P that `set_p` takes on this model, ascending; 1 is the backbone itself."""
    configs = _configs(model)
    offered = {p for config in configs.values() for p in config.heads or [] if p > 1}
    if not any(config.backbone_trained for config in configs.values()):
        offered.add(1)
    return sorted(offered)


def get_p(model: nn.Module) -> int:
    """The P that the next forward pass in this thread uses.

    Raises:
        FamilyError: A one-stream adapter such as the control is active, which is no member of the
            family.
    """
    streams = _decoder_streams(model).selection()
    if streams is not None and streams.num_streams == 1:
        raise FamilyError(
            f"Adapter {streams.adapter!r} is active: one stream with a prefix, which is not the "
            "backbone (P = 1). Choose a P with recycle.set_p(model, p)."
        )
    return 1 if streams is None else streams.num_streams


def set_p(model: nn.Module, p: int) -> None:
    """Use `p` streams from the next forward pass on; 1 disables the adapters: the bare backbone.

    A key-value cache belongs to the P that filled it; `shrink_cache` takes one down within a nested
    family.

    Args:
        model: A PEFT model with ParScale adapters, or a transformers model into which they were
            loaded.
        p: One of `available_p(model)`.

    Raises:
        FamilyError: The family does not offer `p`.
    """
    streams = _find(model, p)
    if streams is not None:
        _decoder_streams(model).p[streams.adapter] = p
    for module in model.modules():
        if isinstance(module, StreamLayer):
            module.enable_adapters(streams is not None)
    if streams is None:
        return
    inference_mode = _configs(model)[streams.adapter].inference_mode
    if isinstance(model, PeftModel):
        model.set_adapter(streams.adapter, inference_mode=inference_mode)
        return
    for module in model.modules():
        if isinstance(module, StreamLayer):
            module.set_adapter(streams.adapter, inference_mode=inference_mode)


@contextmanager
def use_p(model: nn.Module, p: int) -> Iterator[None]:
    """Use `p` streams inside a `with` block and in this thread only.

    So two threads can run two Ps on one model.
    """
    with choose_streams(_decoder_streams(model), _find(model, p)):
        yield


def _configs(model: nn.Module) -> dict[str, ParScaleConfig]:
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, ParScaleConfig)}


def _decoder_streams(model: nn.Module) -> DecoderStreams:
    for module in model.modules():
        if isinstance(module, DecoderStreams):
            return module
    raise FamilyError(
        f"{type(model).__name__} has no ParScale adapter. Load one with recycle.load(folder), or "
        "add one with peft.get_peft_model(model, recycle.parscale.ParScaleConfig(...))."
    )


def _find(model: nn.Module, p: int) -> ActiveStreams | None:
    layer = _decoder_streams(model)
    offered = available_p(model)
    if p not in offered:
        raise FamilyError(f"This model offers P = {_listed(offered)}, got p={p}.")
    if p == 1:
        return None
    names = sorted(layer.heads, key=lambda name: name not in layer.active_adapters)
    name = next(name for name in names if p in layer.heads[name])
    return ActiveStreams(name, p, (p,))


def _listed(offered: list[int]) -> str:
    return ", ".join(map(str, offered)) or "nothing but its one-stream adapter"


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
    streams: list[int] = []
    configs = _configs(model)
    shared: dict[str, Any] = {
        "fingerprint": backbone.to_dict(),
        "base_model_name_or_path": backbone.id,
        "revision": backbone.revision,
        "inference_mode": True,
    }
    for adapter, config in configs.items():
        for p in config.heads or []:
            name = CONTROL if p == 1 else f"p{p}"
            starts = config.start_token_ids and config.start_token_ids[:p]
            member = replace(config, num_streams=p, heads=[p], start_token_ids=starts, **shared)
            write_adapter(folder / name, member, member_state(model, adapter, p))
            sha256[f"{name}/{WEIGHTS}"] = file_sha256(folder / name / WEIGHTS)
            streams += [p] if p > 1 else []
    family = Family(
        streams=sorted(streams),
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
    config: ParScaleConfig, location: str, revision: str | None, source: str
) -> None:
    if not location:
        raise FamilyError(
            f"{source} does not record its backbone. Name it: "
            f"recycle.load({source!r}, backbone=...)."
        )
    if config.fingerprint is None:
        return
    trained_on = Fingerprint.from_dict(config.fingerprint)
    try:
        differing = differences(trained_on, fingerprint(location, revision))
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
