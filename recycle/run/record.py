"""What a run's record says of hardware, backbone, data and documents."""

import hashlib
import json
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from recycle import data, results
from recycle.backbone import Source
from recycle.recipe import Backbone, Recipe

from .folder import RunError

OWN_LICENCE = {"stdlib": "PSF-2.0"}  # sources that have one licence wherever they are


def device_of(recipe: Recipe) -> str:
    if recipe.launch.device == "cuda" and not torch.cuda.is_available():
        raise RunError("launch.device=cuda, but torch sees no CUDA device. Use launch.device=auto.")
    device = recipe.launch.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() > 1:
        raise RunError(
            f"A run trains on one GPU, and torch sees {torch.cuda.device_count()}. Choose one with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    return device


def with_dtype(backbone: Backbone, device: str) -> Backbone:
    """Settle dtype `auto`: a CPU that emulates bfloat16 is slower in it than in float32."""
    if backbone.dtype != "auto":
        return backbone
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return backbone.model_copy(update={"dtype": "bfloat16" if native else "float32"})


def hardware(device: str) -> results.Hardware:
    if device == "cpu":
        return results.hardware()
    properties = torch.cuda.get_device_properties(0)
    return results.hardware(properties.name, properties.total_memory / 2**30)


def backbone_record(recipe: Recipe, model: Any, source: Source) -> results.BackboneRecord:
    on_hub = source.revision is not None
    identifying = {key: value for key, value in source.fingerprint.to_dict().items() if key != "id"}
    packaged = recipe.backbone.id.startswith("package://")
    return results.BackboneRecord(
        id=recipe.backbone.id,
        source="package" if packaged else "hub" if on_hub else "folder",
        revision=source.revision,
        fingerprint=hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=recipe.backbone.quantization,
        parameters=model.num_parameters() - _adapter_parameters(model),
        model_type=model.config.model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        license=_hub_licence(source.id, dataset=False) if on_hub else source.notes.get("license"),
    )


def data_record(recipe: Recipe, splits: data.Splits) -> results.DataRecord:
    path = recipe.data.path
    on_hub = recipe.data.source == "hub"
    return results.DataRecord(
        source=recipe.data.source,
        path=path,
        license=_hub_licence(path or "", dataset=True)
        if on_hub
        else OWN_LICENCE.get(recipe.data.source),
        facts=splits.facts,
    )


def _adapter_parameters(model: Any) -> int:
    return sum(tensor.numel() for name, tensor in model.named_parameters() if "parscale_" in name)


def _hub_licence(repository: str, dataset: bool) -> str | None:
    """The licence that a repository's card on the Hub names; None where it is out of reach."""
    api = HfApi()
    try:
        info = api.dataset_info(repository) if dataset else api.model_info(repository)
    except (HTTPError, OSError):
        return None
    named = info.card_data.get("license") if info.card_data else None
    return ", ".join(named) if isinstance(named, list) else named


def scored_documents(documents: list[data.Document]) -> tuple[results.ScoredDocument, ...]:
    return tuple(
        results.ScoredDocument(
            name=document.name,
            group=document.group,
            tokens=len(document.input_ids) - 1,
            bytes=document.num_bytes,
        )
        for document in documents
    )
