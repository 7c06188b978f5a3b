"""Load a backbone: resolve its source, refuse what cannot be used, freeze what is loaded."""

import importlib.util
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

from .errors import BackboneError, first_line
from .fingerprint import Fingerprint, fingerprint_files
from .package import NOTES, PACKAGE_SCHEME, dequantised
from .repacking import keep_gradients_of_4bit_layers
from .source import (
    SourceError,
    SourceFiles,
    looks_like_path,
    read_config,
    source_files,
)


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
    notes: dict[str, Any] = field(default_factory=dict)
    """For a dequantised file: package, version, licence, file, sha256, what was done to it."""


def load_backbone(
    backbone: BackboneConfig, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """Load a backbone as its recipe says: every parameter frozen, in eval mode, on `device`.

    No code from a model's folder or repository is ever run, and no pickled weights are read.

    Raises:
        BackboneError: the source or its tokenizer is missing, torn, out of reach, of a kind that
            cannot be used, or the quantisation has no library or no support on this device.
    """
    try:
        files = source_files(resolve_source(backbone.id, backbone.revision), backbone.revision)
        _check_architecture(files.id, read_config(files))
        source = Source(files.id, files.revision, fingerprint_files(files), _read_notes(files))
    except SourceError as error:
        raise BackboneError(str(error)) from None
    # Pinned to one commit and, where the Hub is out of reach, not asking it file by file.
    origin = {"revision": source.revision or "main", "local_files_only": files.local_only}
    tokenizer = _load_tokenizer(source.id, **origin)
    model = _load_model(backbone, source.id, torch.device(device), **origin)
    return model, tokenizer, source


def resolve_source(id: str, revision: str | None = None) -> str:
    """Return the absolute folder, or the Hub id, that a recipe's `backbone.id` stands for.

    Dequantises a `package://` file unless its folder lies in the cache already.
    """
    if id.startswith(PACKAGE_SCHEME):
        if revision is not None:
            raise BackboneError(
                f"a revision belongs to a Hub id, but the backbone is {id!r}: "
                f"leave out the revision ({revision!r})"
            )
        return str(dequantised(id))
    path = Path(id).expanduser()
    if path.is_file():
        raise BackboneError(
            f"a backbone is a folder, a Hub id or {PACKAGE_SCHEME}PACKAGE/FILE.gguf, "
            f"but {id!r} is a file"
        )
    return str(path.absolute()) if path.is_dir() or looks_like_path(id) else id


def _check_architecture(name: str, config: dict[str, Any]) -> None:
    """Refuse what is no causal language model of transformers' own."""
    if "parscale_n" in config:
        raise BackboneError(
            f"{name!r} is a ParScale checkpoint, which holds streams already: turn it into an "
            f"adapter and a backbone with `recycle import {name} --out DIR --backbone-out DIR`"
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


def _load_tokenizer(id: str, **origin: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(id, trust_remote_code=False, **origin)
        # Where no tokenizer file is, some model types get an empty tokenizer rather than an error.
        missing = len(tokenizer) <= len(tokenizer.all_special_tokens)
    except (OSError, ValueError, TypeError, ImportError) as error:
        detail = f" ({first_line(error)})"
        missing = True
    else:
        detail = ""
    if missing:
        raise BackboneError(
            f"{id!r} has no tokenizer that transformers can load{detail}: put the tokenizer "
            "of the model it was made from beside the weights (tokenizer.json and "
            "tokenizer_config.json, as `tokenizer.save_pretrained(FOLDER)` writes them)"
        )
    return tokenizer


def _load_model(
    backbone: BackboneConfig, id: str, device: torch.device, **origin: Any
) -> PreTrainedModel:
    placement: dict[str, Any] = {}
    attention = backbone.attn_implementation
    if backbone.quantization is not None:
        placement["quantization_config"] = _quantization_config(backbone)
    if backbone.quantization is not None or device.type != "cpu":
        placement["device_map"] = {"": device}  # straight to the device, not through the CPU
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            id,
            dtype=getattr(torch, backbone.dtype),
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            adapter_kwargs={"local_files_only": origin["local_files_only"]},  # not passed on alone
            **origin,
            **placement,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BackboneError(f"cannot load {id!r}: {first_line(error)}") from None
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        raise BackboneError(
            f"the weights of {id!r} do not fit its config.json: {len(wrong)} tensors are "
            f"missing or of another shape, {wrong[0]!r} among them: get the model anew"
        )
    keep_gradients_of_4bit_layers(model)
    return model.eval().requires_grad_(False)


def _quantization_config(backbone: BackboneConfig) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"backbone.quantization={backbone.quantization} needs bitsandbytes: "
            "`pip install 'recycle-lm[train]'`"
        )
    if backbone.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, backbone.dtype),
    )


def _read_notes(files: SourceFiles) -> dict[str, Any]:
    path = files.config.parent / NOTES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
