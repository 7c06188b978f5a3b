"""What a run works with: the backbone and the data, found to fit each other."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from pyarrow import compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recycle import data, results, world
from recycle.backbone import Source
from recycle.backbone.fingerprint import Fingerprint, differences
from recycle.backbone.source import ADAPTER, ADAPTER_WEIGHTS, fetched
from recycle.cost.shape import count_outside_embeddings
from recycle.disk import expand, write_atomically
from recycle.evaluate.samples import Samples
from recycle.parscale import find_decoder
from recycle.parscale.packing import keeps_sequences_apart
from recycle.progress import Silent
from recycle.recipe import Data, Recipe, Stage

from .folder import CHECKPOINTS, RunError
from .placement import load, place
from .plan import RunPlan
from .settle import settled

BASIS = "basis.json"  # among the checkpoints: what they were made on
OWN_LICENCE = {
    "stdlib": "PSF-2.0",
    "tasks": "Apache-2.0",
}  # sources that have one licence wherever they are
HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Materials:
    """Documents, and what is known of the backbone; the model itself is held by whoever uses it."""

    tokenizer: PreTrainedTokenizerBase
    source: Source
    splits: data.Splits
    backbone: results.BackboneRecord
    data: tuple[results.DataRecord, ...]
    """Of each stage."""
    sections: tuple[str, ...]
    """The recipe's section with the data of each stage."""
    samples: Samples
    """What rows say to a few prompts; it fills as they are measured."""
    adapter_revision: str | None = None
    """Commit of a LoRA that came from the Hub."""

    @property
    def documents(self) -> tuple[results.ScoredDocument, ...]:
        """The test documents, as results.json names them."""
        return tuple(
            results.ScoredDocument(
                name=x.name, group=x.group, tokens=x.predicted_tokens, bytes=x.num_bytes
            )
            for x in self.splits.test
        )

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe with the revisions that were found where it left them open."""
        found = {"backbone.revision": self.source.revision}
        found["backbone.adapter_revision"] = self.adapter_revision
        for section, facts in zip(self.sections, self.splits.facts, strict=True):
            found[f"{section}.revision"] = facts.get("revision")
            for name, part in facts.get("parts", {}).items():
                found[f"{section}.mix.{name}.revision"] = part.get("revision")
        return settled(recipe, found)


def load_materials(
    plan: RunPlan, progress: Silent, prepared: Path | None = None
) -> tuple[PreTrainedModel, Materials]:
    """Load the backbone and read the data.

    Args:
        plan: The run's.
        progress: Shows how far it is.
        prepared: Folder of data that were read before, or where they are to be kept; None reads
            them into memory.

    Raises:
        RunError: Blocks are longer than the backbone's window, or the tokenizer is another model's.
        BackboneError, DataError: See there.
    """
    recipe = plan.recipe
    progress.start("loading the backbone (a file in a package is first dequantised, once)")
    model, tokenizer, source = load(plan)
    packs = keeps_sequences_apart(find_decoder(model), model.device)  # past the hooks of sharding
    place(plan, model)
    for stage in plan.stages:
        _check_window(recipe, stage, model)

    def prepare() -> data.Splits:
        return data.prepare(
            plan.data,
            tokenizer,
            num_virtual_tokens=recipe.method.num_virtual_tokens,
            num_starts=plan.num_starts,
            packs=packs,
            progress=progress,
        )

    splits = prepare() if prepared is None else data.keep(prepared, prepare)
    _check_tokens(splits, model)
    # Licences are asked for now: nothing that can fail or hang may stand between the last step and
    # results.json.
    read = list(zip(plan.stages, splits.facts, strict=True))
    records = world.once(lambda: tuple(_data_record(stage.data, facts) for stage, facts in read))
    backbone = world.once(lambda: _backbone_record(recipe, model, source))
    sections = tuple(_section(recipe, stage) for stage in plan.stages)
    commit = world.once(lambda: _adapter_commit(recipe))
    samples = Samples.of(splits.test, recipe.evaluation.samples)
    materials = Materials(tokenizer, source, splits, backbone, records, sections, samples, commit)
    return model, materials


def _section(recipe: Recipe, stage: Stage) -> str:
    """The section of a recipe that holds the data of a stage."""
    return "data" if stage.data == recipe.data else f"stages.{stage.name}.data"


def _adapter_commit(recipe: Recipe) -> str | None:
    """The commit of a LoRA on the Hub, which is fetched now."""
    adapter, revision = recipe.backbone.adapter, recipe.backbone.adapter_revision
    if adapter is None or expand(adapter).is_dir():
        return None
    return fetched(adapter, revision, [ADAPTER, ADAPTER_WEIGHTS]).name


def _data_record(asked: Data, facts: dict[str, Any]) -> results.DataRecord:
    licence = OWN_LICENCE.get(asked.source)
    if asked.source == "hub":
        licence = _hub_licence(str(asked.path), dataset=True)
    return results.DataRecord(source=asked.source, path=asked.path, license=licence, facts=facts)


def _backbone_record(
    recipe: Recipe, model: PreTrainedModel, source: Source
) -> results.BackboneRecord:
    identifying = {key: value for key, value in source.fingerprint.to_dict().items() if key != "id"}
    packaged = recipe.backbone.id.startswith("package://")
    on_hub = source.revision is not None
    return results.BackboneRecord(
        id=recipe.backbone.id,
        source="package" if packaged else "hub" if on_hub else "folder",
        revision=source.revision,
        fingerprint=hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=source.quantization,
        parameters=model.num_parameters(),
        non_embedding_parameters=count_outside_embeddings(model),
        model_type=model.config.model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        license=_hub_licence(source.id) if on_hub else source.notes.get("license"),
    )


def _check_window(recipe: Recipe, stage: Stage, model: PreTrainedModel) -> None:
    """Refuse blocks and prompts that are longer than the backbone's window.

    A model with learned positions has none for them, and others were never trained on them.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {f"{_section(recipe, stage)}.block_size": stage.data.block_size}
    if recipe.evaluation.speed:
        length = recipe.evaluation.prompt_tokens + recipe.evaluation.new_tokens
        lengths["evaluation.prompt_tokens + evaluation.new_tokens"] = length
    too_long = [f"{k} = {length}" for k, length in lengths.items() if window and length > window]
    if too_long:
        raise RunError(
            f"The window of {recipe.backbone.id} is {window} tokens (max_position_embeddings), and "
            f"{', '.join(too_long)}. Set {'it' if len(too_long) == 1 else 'them'} to at most that."
        )


def _check_tokens(splits: data.Splits, model: PreTrainedModel) -> None:
    """Refuse data with token ids that the model has no embedding for."""
    size = model.get_input_embeddings().num_embeddings
    documents = [*splits.test, *(x for each in splits.validation for x in each)]
    largest = max(*(max(x.input_ids) for x in documents), *splits.starts.flatten().tolist())
    for rows in splits.train:
        if len(rows):
            column = rows.with_format("arrow")["input_ids"]
            largest = max(largest, pc.max(pc.list_flatten(column)).as_py())
    if largest >= size:
        raise RunError(
            f"The tokenizer gives token {largest}, and the backbone has embeddings for 0 to "
            f"{size - 1} only. Put the tokenizer of the model beside its weights."
        )


def _hub_licence(repository: str, dataset: bool = False) -> str | None:
    """The licence that a repository's card on the Hub names; None where it is out of reach."""
    api = HfApi()
    ask = api.dataset_info if dataset else api.model_info
    try:
        info: Any = ask(repository, timeout=HUB_TIMEOUT)
    except (HTTPError, OSError):
        return None
    named = info.card_data.get("license") if info.card_data else None
    return ", ".join(named) if isinstance(named, list) else named


def check_basis(folder: Path, materials: Materials, dtype: str) -> None:
    """Record what a run's checkpoints are made on, or compare it with the record.

    Raises:
        RunError: The checkpoints were made on another backbone, or in other arithmetic.
    """
    record = folder / CHECKPOINTS / BASIS
    backbone = materials.source.fingerprint
    now = {"backbone": backbone.to_dict(), "dtype": dtype}
    if not record.is_file():
        write_atomically(record, json.dumps(now).encode())
        return
    try:
        before = json.loads(record.read_text())
        differing = differences(Fingerprint.from_dict(before["backbone"]), backbone)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{record} is damaged ({error}), so the run cannot be resumed. Choose another folder "
            "with output.dir=FOLDER, or delete this one."
        ) from None
    if before["dtype"] != dtype:
        differing.append(f"it computed in {before['dtype']}, and this machine in {dtype}")
    if differing:
        raise RunError(
            f"{folder} was begun with something else than there is now: {'; '.join(differing)}. "
            "Put that back, or choose another folder with output.dir=FOLDER."
        )
