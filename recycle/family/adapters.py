"""A family in memory: put on a backbone, and saved again.

A nested family is one adapter that serves several P, and an independent family is one adapter for
each P. How it lies on disk is in `folder.py` and `record.py`, how P is chosen in `switch.py`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from recycle.backbone import BackboneError, load_model
from recycle.backbone.fingerprint import Fingerprint, differences, fingerprint_files
from recycle.backbone.lora import put_lora
from recycle.backbone.sample import Sample, take_sample
from recycle.backbone.source import ANYONE, Access, SourceFiles, source_files
from recycle.disk import expand, file_sha256
from recycle.parscale import ParScaleConfig, adapter_parameters, cut_state, streams_of

from .folder import Member, find_folder, find_lora, own_backbone, read_members, write_adapter
from .model import FamilyModel
from .record import ADAPTED, CONFIG, CONTROL, NESTED, WEIGHTS, Family, FamilyError
from .switch import set_p

ACCESS = tuple(Access.__annotations__)


def load(
    source: str | Path,
    p: int | None = None,
    *,
    only: Sequence[int] | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
    compile: bool | None = None,
    **backbone_options: Any,
) -> FamilyModel:
    """Load a backbone with its whole family of adapters.

    Args:
        source: A run folder, the folder of one adapter, or the Hub id of either.
        p: Streams in use first; the largest where not given. 1 is the model that the streams were
            put on: the backbone, with its weights adapted where the run did that.
        only: Values of P to read and keep, such as [4]; None is all of them, and the control. No
            file of another P is read or downloaded. P = 1 is offered in any case.
        backbone: Where the backbone lies now, if not where the adapters recorded it: folder or Hub
            id.
        revision: Revision of `source` on the Hub.
        compile: Whether `generate` decodes by compiled steps on a static cache; None is on an
            accelerator alone. See `FamilyModel`.
        backbone_options: Go to the backbone's `from_pretrained`: device_map, attn_implementation,
            … `token`, `cache_dir` and `local_files_only` hold for `source` as well. The backbone
            computes as it did when the adapters were trained and measured, unless `dtype` or
            `quantization_config` (None for the weights as they are stored) say otherwise; `dtype`
            "auto" does not.

    Returns:
        A PEFT model in eval mode, its adapters in the dtype that it computes in. `set_p` switches
        it; an adapter named "control", where the family has one, is reached with
        `model.set_adapter("control")`.

    Raises:
        FamilyError: The folder holds no family, a file of it is damaged, it lacks `p` or one of
            `only`, or the backbone is missing or another one than the family was trained on. An
            adapter that PEFT wrote has no fingerprint: of its backbone only the shapes are checked.
        BackboneError: The backbone's files are there and cannot be loaded.
    """
    ours = {"trust_remote_code", "use_safetensors", "output_loading_info"}
    if refused := sorted(ours & set(backbone_options)):
        raise FamilyError(
            "recycle.load reads safetensors only and runs no code from a model's repository; leave "
            f"out {' and '.join(refused)}."
        )
    access: Any = {key: backbone_options[key] for key in ACCESS if key in backbone_options}
    folder = find_folder(source, revision, access, only)
    family = Family.read(folder).narrowed(only, str(source))
    family.check(p, str(source), only)
    members = read_members(folder, family)
    config = members[0].config
    files = find_backbone(folder, config, str(source), backbone, access)
    given = [backbone_options.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = next((each for each in given if each not in (None, "auto")), config.backbone_dtype)
    unquantised = "quantization_config" in backbone_options
    quantization = None if unquantised else config.backbone_quantization
    lora = find_lora(folder, config)
    model = load_model(files, dtype, quantization, **backbone_options)
    peft_model = attach(model if lora is None else put_lora(model, lora), members, folder)
    peft_model.compiles = compile
    if p is not None or family.p_values:
        set_p(peft_model, max(family.offered) if p is None else p)
    return peft_model


def find_backbone(
    folder: Path,
    config: ParScaleConfig,
    source: str,
    backbone: str | Path | None = None,
    access: Access = ANYONE,
) -> SourceFiles:
    """The files of a family's backbone, checked to be those that it was trained on.

    Args:
        folder: The local folder of the family.
        config: Of one of its adapters.
        source: What the family is called in errors.
        backbone: Where the backbone lies now: folder or Hub id. None is where the adapters say.
        access: How the Hub is reached.

    Raises:
        FamilyError: It is not recorded, cannot be read, or is another one.
    """
    location, revision = config.base_model_name_or_path, config.revision
    if backbone is not None:
        same = str(backbone) == location and not expand(backbone).is_dir()
        location, revision = str(backbone), revision if same else None
    elif own := own_backbone(folder, location):
        location, revision = str(own), None
    name = "with --backbone on the command line, or recycle.load(..., backbone=...)"
    if not location:
        raise FamilyError(f"{source} does not record its backbone. Name where it lies {name}.")
    try:
        files = source_files(location, revision, access)
        if config.fingerprint is not None:
            check_backbone(config, fingerprint_files(files), source, location)
    except BackboneError as error:
        raise FamilyError(
            f"The backbone of {source} cannot be read: {str(error).rstrip('.')}. Name where it "
            f"lies {name}."
        ) from None
    return files


def check_backbone(config: ParScaleConfig, found: Fingerprint, source: str, location: str) -> None:
    """Refuse a backbone that is not the one that an adapter was trained on.

    Raises:
        FamilyError: Says in what they differ.
    """
    try:
        trained_on = Fingerprint.from_dict(config.fingerprint or {})
    except TypeError as error:
        raise FamilyError(
            f"{source}: the fingerprint in {CONFIG} is damaged ({error}). Copy the whole folder "
            "again."
        ) from None
    if differing := differences(trained_on, found):
        raise FamilyError(
            f"{source} was trained on the backbone {trained_on.id} (revision "
            f"{trained_on.revision}), and {location} is another backbone: {'; '.join(differing)}. "
            "Name where the right one lies, with --backbone on the command line or "
            "recycle.load(..., backbone=...)."
        )


def attach(model: PreTrainedModel, members: list[Member], folder: Path) -> FamilyModel:
    """Put a family's adapters, as `read_members` gives them, on a backbone that is loaded."""
    first, *others = members
    with warnings.catch_warnings():  # PEFT asks transformers by a name that it is giving up
        warnings.simplefilter("ignore", FutureWarning)
        peft_model = FamilyModel(model, first.config, adapter_name=first.name)
    peft_model.foundation = first.config
    load_state(peft_model, first, folder)
    for member in others:
        peft_model.add_adapter(member.name, member.config)
        load_state(peft_model, member, folder)
    return peft_model.eval()


def adapter_state(model: PeftModelForCausalLM, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter, under PEFT's names."""
    # Told nothing about embeddings, PEFT looks for the backbone's config on the Hub.
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def member_state(model: PeftModelForCausalLM, adapter: str, p: int) -> dict[str, Tensor]:
    """The tensors of an adapter's first `p` streams, as a plain adapter with P = `p` holds them."""
    state = cut_state(adapter_state(model, adapter), p)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_family(
    model: PeftModelForCausalLM,
    folder: Path,
    backbone: Fingerprint,
    weights: Sample | None = None,
) -> Family:
    """Write every adapter of the model below `folder` and `family.json`, which makes it a family.

    Args:
        model: A PEFT model with the adapter "nested", or one adapter for each P, and perhaps
            "control".
        folder: An existing folder; a LoRA that was put on the backbone lies in its `adapted/`.
        backbone: Fingerprint of the source that the backbone was loaded from.
        weights: What `take_sample` gave of the model; None takes it of the backbone as it is.
    """
    sha256 = {}
    lora = folder / ADAPTED / WEIGHTS
    if lora.is_file():
        sha256[f"{ADAPTED}/{WEIGHTS}"] = file_sha256(lora)
    p_values: list[int] = []
    configs = streams_of(model).selection.configs
    shared: dict[str, Any] = {
        "fingerprint": backbone.to_dict(),
        "base_model_name_or_path": backbone.id,
        "revision": backbone.revision,
        "adapter_sha256": sha256.get(f"{ADAPTED}/{WEIGHTS}"),
        "weights": weights or take_sample(model.get_base_model()),
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
        backbone_trained=any(config.backbone_trained for config in configs.values()),
        sha256=sha256,
    )
    family.write(folder)
    return family


def load_state(model: PeftModelForCausalLM, member: Member, folder: Path) -> None:
    """Fill an adapter of the model that bears the member's name, in the model's dtype.

    Streams compute in it anyway, so that a step of decoding has nothing to cast.

    Raises:
        FamilyError: The tensors are not those of its config.
    """
    expected = adapter_state(model, member.name)
    wrong = sorted(set(expected) ^ set(member.state)) or [
        name for name in expected if expected[name].shape != member.state[name].shape
    ]
    resized = [name for name in wrong if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if resized:
        size = member.state[resized[0]].shape[0]
        raise FamilyError(
            f"{folder} holds the backbone's embeddings as well ({', '.join(resized)}), for a "
            f"vocabulary of {size} tokens that was resized before it was saved; recycle.load "
            "leaves the backbone as it is. Load it with PEFT, after "
            f"model.resize_token_embeddings({size}): PeftModel.from_pretrained(model, FOLDER). Or "
            "save the resized backbone, and the adapter with save_embedding_layers=False."
        )
    if wrong:
        raise FamilyError(
            f"{folder}: the weights of adapter {member.name!r} do not fit its config; {len(wrong)} "
            f"tensors differ, first {wrong[0]}."
        )
    set_peft_model_state_dict(model, member.state, adapter_name=member.name)
    for each in adapter_parameters(model, member.name):
        each.parameter.data = each.parameter.data.to(model.dtype)
