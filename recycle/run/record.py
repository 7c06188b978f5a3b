"""What a run's record says of its backbone, data and documents."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from recycle import data, results
from recycle.recipe import Recipe

from .materials import Materials


def backbone_record(recipe: Recipe, materials: Materials) -> results.BackboneRecord:
    source, model = materials.source, materials.model
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
        parameters=_backbone_parameters(model),
        model_type=model.config.model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        license=materials.backbone_licence,
    )


def _backbone_parameters(model: Any) -> int:
    adapters = sum(p.numel() for name, p in model.named_parameters() if "parscale_" in name)
    return model.num_parameters() - adapters


def data_record(recipe: Recipe, materials: Materials) -> results.DataRecord:
    return results.DataRecord(
        source=recipe.data.source,
        path=recipe.data.path,
        license=materials.data_licence,
        facts=materials.splits.facts,
    )


def scored_documents(documents: Sequence[data.Document]) -> tuple[results.ScoredDocument, ...]:
    return tuple(
        results.ScoredDocument(
            name=document.name,
            group=document.group,
            tokens=document.predicted_tokens,
            bytes=document.num_bytes,
        )
        for document in documents
    )
