"""Weights at P = 1: the first stage, and the weights that streams are compared with."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from recycle import world
from recycle.backbone import BackboneError, Source
from recycle.backbone.header import read_header
from recycle.backbone.lora import check_lora, lora_targets, put_lora
from recycle.backbone.sample import watch
from recycle.backbone.source import ADAPTER, ADAPTER_WEIGHTS, fetched
from recycle.disk import write_atomically
from recycle.evaluate import Pass, measure
from recycle.family import ADAPTED, Family
from recycle.family.adapters import check_backbone
from recycle.family.folder import find_folder, find_lora, read_members
from recycle.progress import Silent
from recycle.recipe.consequences import FREE
from recycle.results import Measurement, TrainingRecord
from recycle.train import TrainingPlan, add_lora, free_weights, train
from recycle.train.checkpoints import is_complete, seal, writing

from .folder import RunError, next_to
from .materials import Materials
from .placement import load, place
from .plan import RunPlan

# Fields of `training` that change no more than memory, time and rounding.
NOT_LEARNED = {"checkpoint_steps"} | {x.removeprefix("training.") for x in FREE}
BASIS, TRAINING = "basis.json", "training.json"  # beside what a first stage left


@dataclass(frozen=True)
class Foundation:
    """The model that streams are put on."""

    model: PreTrainedModel
    source: Source
    before: Mapping[str, Tensor] | None = None
    """A few weights from before they were adapted, see `recycle.backbone.sample`."""


def train_compared(plan: RunPlan, materials: Materials, progress: Silent) -> list[TrainingRecord]:
    """Train the weights that streams are compared with, and leave them in the run folder."""
    if plan.compare is None:
        return []
    blocks = datasets.concatenate_datasets(list(materials.splits.train))
    return [
        _train_weights(plan, materials, plan.compare, blocks, _folder(plan, plan.compare), progress)
    ]


def measure_compared(plan: RunPlan, materials: Materials, progress: Silent) -> list[Measurement]:
    """Measure the weights that streams are compared with, as they lie in the run folder."""
    if plan.compare is None:
        return []
    folder, model = _folder(plan, plan.compare), load_compared(plan)
    settings = plan.recipe.evaluation.model_copy(update={"speed": False})  # that of P = 1
    row = plan.compare.rows[0]
    parameters = {row: count_parameters(folder)}
    passes, test, tokenizer = [Pass(None, [row])], materials.splits.test, materials.tokenizer
    samples = materials.samples
    return measure(model, passes, test, settings, tokenizer, progress, parameters, samples)


def load_compared(plan: RunPlan) -> PreTrainedModel:
    """The weights that streams are compared with, as they lie in the run folder."""
    assert plan.compare is not None
    return _adapted(plan, _folder(plan, plan.compare))[0]


def adapt(plan: RunPlan, materials: Materials, progress: Silent) -> list[TrainingRecord]:
    """The first stage: leave adapted weights in `adapted/`, unless they lie there.

    Returns:
        The record of its training, if it has one.
    """
    folder = plan.folder / ADAPTED
    if plan.adapt is None:
        return []
    world.once(lambda: _take_earlier(plan, materials, folder, progress))
    return [
        _train_weights(plan, materials, plan.adapt, materials.splits.train[0], folder, progress)
    ]


def _take_earlier(plan: RunPlan, materials: Materials, folder: Path, progress: Silent) -> None:
    """Copy the first stage of an earlier run that learned the same."""
    if is_complete(folder) or not (earlier := _earlier(plan, materials)):
        return
    progress.say(f"{folder} is that of {earlier.parent}, which learned the same")
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(earlier, folder)


def foundation(plan: RunPlan, untouched: Mapping[str, Tensor] = MappingProxyType({})) -> Foundation:
    """The model that streams are put on: a fresh backbone, adapted as the run folder says.

    Args:
        plan: The run's.
        untouched: What `watch` gave of the backbone.
    """
    folder = plan.folder / ADAPTED
    if not folder.is_dir():
        model, _, source = load(plan)
        return Foundation(place(plan, model), source)
    model, source, before = _adapted(plan, folder)
    return Foundation(model, source, untouched if before is None else before)


def _train_weights(
    plan: RunPlan,
    materials: Materials,
    training: TrainingPlan,
    blocks: datasets.Dataset,
    folder: Path,
    progress: Silent,
) -> TrainingRecord:
    """Train a LoRA, or all weights, of a fresh backbone; leave a plain adapter, or a model."""
    if world.once(lambda: is_complete(folder)):
        return TrainingRecord.model_validate_json((folder / TRAINING).read_text())
    backbone = place(plan, load(plan)[0])
    dtypes = {name: x.dtype for name, x in backbone.named_parameters()}
    stage, batch_size = plan.recipe.stages.adapt, plan.recipe.evaluation.batch_size
    model: Any = (
        free_weights(backbone) if training.all_weights else add_lora(backbone, training, stage)
    )
    # Weights that are compared choose their best point as the streams do.
    validation = materials.splits.validation[0 if training is plan.adapt else -1]
    record = train(model, training, blocks, validation, batch_size, progress)

    def save() -> None:
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            if training.all_weights:
                round_weights(backbone, dtypes)
                backbone.save_pretrained(folder)
                materials.tokenizer.save_pretrained(folder)
            else:
                _save_lora(model, folder, plan)
            write_atomically(folder / BASIS, json.dumps(_basis(plan, materials)).encode())
            write_atomically(folder / TRAINING, record.model_dump_json().encode())
            seal(folder)

    world.once(save)
    return record


def round_weights(model: nn.Module, dtypes: Mapping[str, Any]) -> None:
    """Put weights that learned in float32 back into what they compute in."""
    parameters = dict(model.named_parameters())
    for name, dtype in dtypes.items():
        parameters[name].data = parameters[name].data.to(dtype)
    model.requires_grad_(False)


def _save_lora(model: PeftModel, folder: Path, plan: RunPlan) -> None:
    """A plain PEFT adapter, directly in the folder."""
    adapter = model.active_adapter
    model.peft_config[adapter].base_model_name_or_path = plan.recipe.backbone.id
    model.peft_config[adapter].revision = plan.recipe.backbone.revision
    model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
    if (folder / adapter).is_dir():  # PEFT has a folder for each name but "default"
        for file in (folder / adapter).iterdir():
            file.rename(folder / file.name)
        (folder / adapter).rmdir()
    (folder / "README.md").unlink(missing_ok=True)


def _adapted(
    plan: RunPlan, folder: Path
) -> tuple[PreTrainedModel, Source, Mapping[str, Tensor] | None]:
    """A LoRA merged into a fresh backbone, which is watched before; or the model in the folder."""
    if not is_complete(folder):
        raise RunError(
            f"{folder} is missing, or not as the run left it: copy the whole run folder again."
        )
    backbone = plan.recipe.backbone
    if not (folder / ADAPTER).is_file():
        backbone = backbone.model_copy(update={"id": str(folder.absolute()), "revision": None})
        model, _, source = load(plan, backbone)
        return place(plan, model), source, None
    model, _, source = load(plan)
    before = watch(model, lora_targets(folder))
    return place(plan, put_lora(model, folder)), source, before


def find_adapter(plan: RunPlan, materials: Materials, model: PreTrainedModel) -> Path | None:
    """The LoRA that the weights were adapted with elsewhere, or that another family stands on.

    Raises:
        BackboneError, FamilyError: It is none, or of another backbone.
    """
    backbone, start = plan.recipe.backbone, plan.recipe.stages.streams.start
    place: Path | None = None
    if backbone.adapter is not None:
        revision = backbone.adapter_revision
        place = fetched(backbone.adapter, revision, [ADAPTER, ADAPTER_WEIGHTS])
    elif start is not None:
        family = find_folder(start, None)
        config = read_members(family, Family.read(family))[0].config
        check_backbone(config, materials.source.fingerprint, start, backbone.id)
        place = find_lora(family, config)
    if place is None:
        return None
    check_lora(place)
    modules = {name for name, _ in model.named_modules()}
    if lacking := [name for name in lora_targets(place) if name not in modules]:
        raise BackboneError(
            f"the LoRA in {str(place)!r} is of another backbone: {backbone.id} has no {lacking[0]}"
        )
    return place


def bring_adapter(place: Path | None, folder: Path) -> None:
    """Copy a LoRA to `adapted/` in a run's folder, unless it lies there."""
    if place is None or is_complete(folder / ADAPTED):
        return
    with writing(folder / ADAPTED):
        shutil.rmtree(folder / ADAPTED, ignore_errors=True)
        (folder / ADAPTED).mkdir(parents=True)
        for file in (ADAPTER, ADAPTER_WEIGHTS):
            shutil.copyfile(place / file, folder / ADAPTED / file)
        seal(folder / ADAPTED)


def _earlier(plan: RunPlan, materials: Materials) -> Path | None:
    """A finished first stage of the same weights, data and settings, in a run beside this one."""
    basis = _basis(plan, materials)
    for run in next_to(plan.folder):
        found = run / ADAPTED
        if is_complete(found) and json.loads((found / BASIS).read_text()) == basis:
            return found
    return None


def _basis(plan: RunPlan, materials: Materials) -> dict[str, Any]:
    """All that decides what a first stage learns."""
    stage, adapt = plan.stages[0], plan.recipe.stages.adapt
    return {
        "backbone": materials.source.fingerprint.to_dict() | {"id": None, "revision": None},
        "dtype": plan.recipe.backbone.dtype,
        "quantization": materials.source.quantization,
        "train": adapt.model_dump(
            mode="json", include={"train", "rank", "alpha", "target_modules"}
        ),
        "rates": stage.rates,
        "training": stage.training.model_dump(mode="json", exclude=NOT_LEARNED),
        "block_size": stage.data.block_size,
        "seed": stage.data.seed,
        "data": materials.splits.facts[0]["sha256"]["train"],
        "validation": materials.splits.facts[0]["sha256"]["validation"],
    }


def count_parameters(folder: Path) -> int:
    """Parameters of the LoRA, or of the model, in a folder."""
    files = folder.glob("*.safetensors")
    return sum(math.prod(x.shape) for file in files for x in read_header(file).values())


def _folder(plan: RunPlan, training: TrainingPlan) -> Path:
    return plan.folder / ("full" if training.all_weights else "lora")
