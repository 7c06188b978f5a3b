"""What a run works with: the backbone and the data, loaded and found to fit each other."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recycle import data, results
from recycle.backbone import Source, load_backbone
from recycle.backbone.fingerprint import Fingerprint, differences
from recycle.disk import write_atomically
from recycle.progress import Silent
from recycle.recipe import Recipe

from .folder import CHECKPOINTS, RunError
from .plan import RunPlan
from .settle import settled

BASIS = "basis.json"  # among the checkpoints: what they were made on
OWN_LICENCE = {"stdlib": "PSF-2.0"}  # sources that have one licence wherever they are
HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Materials:
    """A backbone and documents."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    splits: data.Splits
    backbone: results.BackboneRecord
    data: results.DataRecord

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
        return settled(
            recipe,
            {
                "backbone": {"revision": self.source.revision, "dtype": recipe.backbone.dtype},
                "data": {"revision": self.splits.facts.get("revision")},
            },
        )


def load_materials(plan: RunPlan, progress: Silent) -> Materials:
    """Load the backbone and read the data.

    Raises:
        RunError: Blocks are longer than the backbone's window, or the tokenizer is another model's.
        BackboneError, DataError: See there.
    """
    recipe = plan.recipe
    progress.start("loading the backbone (a file in a package is first dequantised, once)")
    model, tokenizer, source = load_backbone(recipe.backbone, plan.device)
    _check_window(recipe, model)
    splits = data.prepare(
        recipe.data,
        tokenizer,
        train_blocks=plan.train_blocks,
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        num_starts=plan.num_starts,
        progress=progress,
    )
    _check_tokens(splits, model)
    # Licences are asked for now: nothing that can fail or hang may stand between the last step and
    # results.json.
    backbone = _backbone_record(recipe, model, source)
    data_licence = OWN_LICENCE.get(recipe.data.source)
    if recipe.data.source == "hub":
        data_licence = _hub_licence(str(recipe.data.path), dataset=True)
    data_record = results.DataRecord(
        source=recipe.data.source,
        path=recipe.data.path,
        license=data_licence,
        facts=splits.facts,
    )
    return Materials(model, tokenizer, source, splits, backbone, data_record)


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
        model_type=model.config.model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        license=_hub_licence(source.id) if on_hub else source.notes.get("license"),
    )


def _check_window(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse blocks and prompts that are longer than the backbone's window.

    A model with learned positions has none for them, and others were never trained on them.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.block_size": recipe.data.block_size}
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
    rows = [document.input_ids for document in (*splits.validation, *splits.test)]
    rows += splits.starts.tolist()
    blocks = splits.train.with_format("numpy")[:]["input_ids"]
    largest = max(max(map(max, rows)), int(np.max(blocks, initial=0)))
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


def check_basis(folder: Path, materials: Materials) -> None:
    """Record what a run's checkpoints are made on, or compare it with the record.

    Raises:
        RunError: The checkpoints were made on another backbone, other data, or in other arithmetic.
    """
    record = folder / CHECKPOINTS / BASIS
    backbone, dtype = materials.source.fingerprint, str(materials.model.dtype)
    data_hashes = materials.splits.facts["sha256"]
    now = {"backbone": backbone.to_dict(), "dtype": dtype, "data": data_hashes}
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
    if before["data"] != data_hashes:
        differing.append("the data were others (their SHA-256 differs)")
    if differing:
        raise RunError(
            f"{folder} was begun with something else than there is now: {'; '.join(differing)}. "
            "Put that back, or choose another folder with output.dir=FOLDER."
        )
