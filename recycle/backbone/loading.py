"""Load a backbone: resolve its source, refuse what cannot be used, freeze what is loaded."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recycle.disk import expand

from .errors import BackboneError, first_line
from .fingerprint import Fingerprint, fingerprint_files
from .package import NOTES, PACKAGE_SCHEME, dequantised
from .quantization import (
    compute_in,
    keep_gradients_of_4bit_layers,
    quantization_config,
    settle_quantization,
    stored_quantization,
)
from .source import SourceFiles, read_config, refuse_revision, source_files


class BackboneConfig(Protocol):
    """The section `backbone` of a recipe."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attn_implementation(self) -> str: ...
    @property
    def quantization(self) -> str | None: ...


@dataclass(frozen=True)
class Source:
    """Where a loaded backbone is from."""

    id: str
    """Hub id or absolute folder: what adapters record as their base model."""
    revision: str | None
    """Commit on the Hub, None for a folder."""
    fingerprint: Fingerprint
    quantization: str | None = None
    """What the weights are in: "int8", "nf4", or another method that they are stored in."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For a dequantised file: package, version, licence, file, sha256, what was done to it."""


def load_backbone(
    backbone: BackboneConfig, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """Load a backbone as its recipe says: every parameter frozen, in eval mode, on `device`.

    No code from a model's folder or repository is ever run, and no pickled weights are read.

    Raises:
        BackboneError: the source or its tokenizer is missing, damaged, out of reach, of a kind that
            cannot be used, or the quantisation has no library or no support on this device.
    """
    files = source_files(resolve_source(backbone.id, backbone.revision), backbone.revision)
    config = read_config(files)
    check_architecture(files.id, config)
    stored = stored_quantization(config)
    quantization = settle_quantization(files.id, stored, backbone.quantization)
    notes = files.folder / NOTES
    source = Source(
        id=files.id,
        revision=files.revision,
        fingerprint=fingerprint_files(files),
        quantization=quantization,
        notes=json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {},
    )
    tokenizer = load_tokenizer(files.folder)
    attention = backbone.attn_implementation
    options: dict[str, Any] = {"attn_implementation": None if attention == "auto" else attention}
    place = torch.device(device)
    if place == torch.device("cuda"):  # of several, the process's own: accelerate asks which
        place = torch.device("cuda", torch.cuda.current_device())
    if quantization is not None or place.type != "cpu":
        options["device_map"] = {"": place}  # straight to the device, not through the CPU
    return load_model(files, backbone.dtype, quantization, **options), tokenizer, source


def resolve_source(id: str, revision: str | None = None) -> str:
    """Return the folder, or the Hub id, that a recipe's `backbone.id` stands for.

    Dequantises a `package://` file unless its folder lies in the cache already.
    """
    if id.startswith(PACKAGE_SCHEME):
        refuse_revision(id, revision)
        return str(dequantised(id))
    if expand(id).is_file():
        raise BackboneError(
            f"a backbone is a folder, a Hub id or {PACKAGE_SCHEME}PACKAGE/FILE.gguf, "
            f"but {id!r} is a file"
        )
    return id


def load_model(
    files: SourceFiles,
    dtype: str | torch.dtype | None,
    quantization: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal LM from its files: every parameter frozen, in eval mode.

    Args:
        files: See `source_files`.
        dtype: What it computes in, also where it is stored quantised; None is as it was saved.
        quantization: "int8" or "nf4", what weights are rounded to that are not stored quantised.
        options: Go to `from_pretrained`.

    Raises:
        BackboneError: It cannot be loaded, its weights do not fit its config.json, or there is no
            bitsandbytes.
    """
    stored = stored_quantization(read_config(files)) is not None
    if quantization is not None and not stored:
        options["quantization_config"] = quantization_config(quantization, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BackboneError(
            f"The backbone {files.id} cannot be loaded: {first_line(error)}"
        ) from None
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        raise BackboneError(
            f"the weights of {files.id!r} do not fit its config.json: {len(wrong)} tensors are "
            f"missing or of another shape, {wrong[0]!r} among them: get the model anew"
        )
    if stored and dtype is not None:
        compute_in(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    keep_gradients_of_4bit_layers(model)
    model.name_or_path = model.config.name_or_path = files.id  # not a folder of the Hub's cache
    return model.eval().requires_grad_(False)


def check_architecture(name: str, config: dict[str, Any]) -> None:
    """Refuse what is no causal language model of transformers' own."""
    if "parscale_n" in config:
        raise BackboneError(
            f"{name!r} is a ParScale checkpoint, which holds streams already: turn it into an "
            f"adapter and a backbone with `recycle import {name} DIR --backbone-out DIR`"
        )
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        known = f"transformers {transformers.__version__} does not know model type {model_type!r}"
        if "auto_map" in config:
            raise BackboneError(
                f"{name!r} needs code of its own (trust_remote_code), which recycle never runs, "
                f"and {known}: take a model of a type that transformers knows"
            )
        raise BackboneError(f"{known} of {name!r}: take another model or a newer transformers")
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    classes = {classes} if isinstance(classes, str) else set(classes)
    architectures = config.get("architectures") or sorted(classes)
    if config.get("is_encoder_decoder") or not classes.intersection(architectures):
        expected = f", for this model type one of {sorted(classes)}" if classes else ""
        raise BackboneError(
            f"a backbone must be a causal language model{expected}; {name!r} is a {model_type} "
            f"with architectures {architectures}: take another model"
        )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local folder; no code from there is ever run.

    Raises:
        BackboneError: There is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Where no tokenizer file is, some model types get an empty tokenizer rather than an error.
        missing, detail = len(tokenizer) <= len(tokenizer.all_special_tokens), ""
    except Exception as error:
        # The tokenizers library has no exception class of its own.
        if not isinstance(error, OSError | ValueError | TypeError | ImportError | KeyError) and (
            type(error) is not Exception
        ):
            raise
        missing, detail = True, f" ({first_line(error)})"
    if missing:
        raise BackboneError(
            f"{str(folder)!r} has no tokenizer that transformers can load{detail}: put the "
            "tokenizer of the model it was made from beside the weights (tokenizer.json and "
            "tokenizer_config.json, as `tokenizer.save_pretrained(FOLDER)` writes them)"
        )
    return tokenizer
