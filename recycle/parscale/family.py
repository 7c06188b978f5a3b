"""Adapters of several P on one backbone: load, switch, save.

In memory a nested family is one adapter whose heads are the values of P, and an independent family is one adapter for
each P. On disk either is a folder of plain PEFT adapters, `p2/`, `p4/`, …, perhaps `control/`, and `family.json`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .config import ParScaleConfig
from .fingerprint import Fingerprint, differences, fingerprint
from .prefix import ActiveStreams, StreamLayer
from .streams import DecoderStreams, choose_streams

FAMILY_FILE = "family.json"
FAMILY_VERSION = 1
NESTED = "nested"
CONTROL = "control"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class FamilyError(ValueError):
    """A family folder cannot be loaded, or does not have the P that was asked for."""


@dataclass(frozen=True)
class Family:
    """What the adapters of a run folder share: the content of `family.json`."""

    streams: list[int]
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
        try:
            if path.is_file():
                content = json.loads(path.read_text())
                if content.get("version") != FAMILY_VERSION:
                    raise FamilyError(
                        f"{path} has version {content.get('version')}, this recycle reads version "
                        f"{FAMILY_VERSION}. Upgrade recycle-lm."
                    )
                return Family(**content)
            config = _read_config(folder)
        except (json.JSONDecodeError, TypeError) as error:
            raise FamilyError(f"{folder} holds a torn or foreign JSON file: {error}.") from None
        return Family(
            streams=[p for p in config.heads or [] if p > 1],
            nested=len(config.heads or []) > 1,
            control=config.num_streams == 1,
            backbone=config.base_model_name_or_path or "",
            revision=config.revision,
            backbone_trained=config.backbone_trained,
            sha256={},
        )


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
        backbone: Where the backbone lies now, if not where the adapters recorded it: folder or Hub id.
        revision: Revision of `source` on the Hub.
        backbone_options: Go to the backbone's `from_pretrained`: dtype, device_map, quantization_config,
            attn_implementation, …

    Returns:
        A PEFT model in eval mode. `set_p` switches it; an adapter named "control", where the family has one, is reached with
        `model.set_adapter("control")`.

    Raises:
        FamilyError: The folder holds no family, a file of it is torn, it lacks `p`, or the backbone is another one than
            the family was trained on.
    """
    folder = _folder(source, revision)
    family = Family.read(folder)
    offered = ([] if family.backbone_trained else [1]) + family.streams
    if p is not None and p not in offered:
        raise FamilyError(f"{source} offers P = {_listed(offered)}, got p={p}.")
    members = _read_members(folder, family)
    recorded = members[0][1]
    location = str(backbone or family.backbone)
    _check_backbone(recorded, location, None if backbone else family.revision, str(source))

    model = AutoModelForCausalLM.from_pretrained(
        location,
        revision=(None if backbone else family.revision) or "main",
        trust_remote_code=False,
        use_safetensors=True,
        **backbone_options,
    )
    peft_model: PeftModelForCausalLM | None = None
    for name, config, state in members:
        if peft_model is None:
            peft_model = PeftModelForCausalLM(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
        _load_state(peft_model, name, state, folder)
    assert peft_model is not None
    peft_model.eval()
    if offered:
        set_p(peft_model, max(offered) if p is None else p)
    return peft_model


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
        FamilyError: A one-stream adapter such as the control is active, which is no member of the family.
    """
    streams = _decoder_streams(model).selection()
    if streams is not None and streams.num_streams == 1:
        raise FamilyError(
            f"Adapter {streams.adapter!r} is active: one stream with a prefix, which is not the backbone (P = 1). "
            "Choose a P with recycle.set_p(model, p)."
        )
    return 1 if streams is None else streams.num_streams


def set_p(model: nn.Module, p: int) -> None:
    """Use `p` streams from the next forward pass on; 1 disables the adapters and is the backbone, bit for bit.

    A key-value cache belongs to the P that filled it; `shrink_cache` takes one down within a nested family.

    Args:
        model: A PEFT model with ParScale adapters, or a transformers model into which they were loaded.
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
    """Use `p` streams inside a `with` block and in this thread only, so that two threads can run two Ps on one model."""
    with choose_streams(_decoder_streams(model), _find(model, p)):
        yield


def _configs(model: nn.Module) -> dict[str, ParScaleConfig]:
    configs = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, ParScaleConfig)}


def _decoder_streams(model: nn.Module) -> DecoderStreams:
    for module in model.modules():
        if isinstance(module, DecoderStreams):
            return module
    raise FamilyError(
        f"{type(model).__name__} has no ParScale adapter. Load one with recycle.load(folder), or add one with "
        "peft.get_peft_model(model, recycle.parscale.ParScaleConfig(...))."
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


# --- on disk ---------------------------------------------------------------------------------------------------------


def member_state(model: PeftModelForCausalLM, adapter: str, p: int) -> dict[str, Tensor]:
    """The tensors of the first `p` streams of an adapter, as a plain adapter with P = `p` would hold them."""
    state = {}
    for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
        leaf = name.rpartition(".")[2]
        if leaf in ("parscale_keys", "parscale_values"):
            state[name] = tensor[:p].detach().cpu().contiguous()
        elif leaf.startswith(f"p{p}_"):
            state[name] = tensor.detach().cpu().contiguous()
    return state


def save_family(model: PeftModelForCausalLM, folder: Path, backbone: Fingerprint) -> Family:
    """Write every adapter of the model below `folder` and `family.json` last, which makes the family whole.

    Args:
        model: A PEFT model with the adapter "nested", or one adapter for each P, and perhaps "control".
        folder: An existing folder.
        backbone: Fingerprint of the source that the backbone was loaded from.
    """
    sha256 = {}
    streams: list[int] = []
    configs = _configs(model)
    for adapter, config in configs.items():
        for p in config.heads or []:
            name = CONTROL if p == 1 else f"p{p}"
            member = replace(
                config,
                num_streams=p,
                heads=[p],
                start_token_ids=config.start_token_ids and config.start_token_ids[:p],
                fingerprint=backbone.to_dict(),
                base_model_name_or_path=backbone.id,
                revision=backbone.revision,
                inference_mode=True,
            )
            write_adapter(folder / name, member, member_state(model, adapter, p))
            sha256[f"{name}/{WEIGHTS}"] = _sha256(folder / name / WEIGHTS)
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
    (folder / FAMILY_FILE).write_text(json.dumps(asdict(family), indent=2) + "\n")
    return family


def write_adapter(folder: Path, config: ParScaleConfig, state: dict[str, Tensor]) -> None:
    """Write one plain PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _folder(source: str | Path, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / FAMILY_FILE).is_file() and not (folder / CONFIG).is_file():
            raise FamilyError(
                f"{folder} holds neither {FAMILY_FILE} (a run folder) nor {CONFIG} (one adapter). "
                "A run writes them when its training is finished."
            )
        return folder
    try:
        return Path(
            snapshot_download(
                str(source), revision=revision, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise FamilyError(
            f"{source!r} is no folder here, and as a Hub id it could not be fetched: {reason}"
        ) from None


def _read_config(folder: Path) -> ParScaleConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, OSError) as error:
        raise FamilyError(
            f"{folder / CONFIG} cannot be read as an adapter's config: {error}"
        ) from None
    if not isinstance(config, ParScaleConfig):
        raise FamilyError(
            f"{folder / CONFIG} is a {config.peft_type} adapter; recycle loads ParScale adapters. "
            "Load it with peft.PeftModel.from_pretrained."
        )
    return config


def _read_members(
    folder: Path, family: Family
) -> list[tuple[str, ParScaleConfig, dict[str, Tensor]]]:
    """Each adapter to have in memory: its name, config and tensors. A nested family is one of them."""
    if not (folder / FAMILY_FILE).is_file():
        return [("default", _read_config(folder), _read_state(folder, None))]
    states = {
        p: (folder / f"p{p}", _read_config(folder / f"p{p}")) for p in sorted(family.streams)[::-1]
    }
    members = []
    if family.nested:
        largest = max(family.streams)
        where, config = states[largest]
        state = _read_state(where, family.sha256.get(f"p{largest}/{WEIGHTS}"))
        for p in family.streams:
            if p != largest:
                part = _read_state(folder / f"p{p}", family.sha256.get(f"p{p}/{WEIGHTS}"))
                state |= {name: tensor for name, tensor in part.items() if "aggregator" in name}
        config = replace(config, heads=list(family.streams))
        members.append((NESTED, config, state))
    else:
        for p, (where, config) in states.items():
            state = _read_state(where, family.sha256.get(f"p{p}/{WEIGHTS}"))
            members.append((f"p{p}", config, state))
    if family.control:
        where = folder / CONTROL
        state = _read_state(where, family.sha256.get(f"{CONTROL}/{WEIGHTS}"))
        members.append((CONTROL, _read_config(where), state))
    for _, config, _ in members:
        config.inference_mode = True
    return members


def _read_state(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if sha256 is not None and _sha256(path) != sha256:
            raise FamilyError(
                f"{path} is not the file that {FAMILY_FILE} records (its SHA-256 differs): it is torn, or comes "
                "from another run. Copy the whole run folder again."
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


def _load_state(
    model: PeftModelForCausalLM, adapter: str, state: dict[str, Tensor], folder: Path
) -> None:
    expected = get_peft_model_state_dict(model, adapter_name=adapter)
    wrong = sorted(set(expected) ^ set(state)) or [
        name for name in expected if expected[name].shape != state[name].shape
    ]
    if wrong:
        raise FamilyError(
            f"{folder}: the weights of adapter {adapter!r} do not fit its config; {len(wrong)} tensors differ, "
            f"first {wrong[0]}."
        )
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def _check_backbone(
    config: ParScaleConfig, location: str, revision: str | None, source: str
) -> None:
    if not location:
        raise FamilyError(
            f"{source} does not record its backbone. Name it: recycle.load({source!r}, backbone=...)."
        )
    if config.fingerprint is None:
        return
    trained_on = Fingerprint.from_dict(config.fingerprint)
    differing = differences(trained_on, fingerprint(location, revision))
    if differing:
        raise FamilyError(
            f"{source} was trained on the backbone {trained_on.id} (revision {trained_on.revision}), and "
            f"{location} is another one: {'; '.join(differing)}. Pass where that backbone lies: "
            "recycle.load(..., backbone=...)."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
