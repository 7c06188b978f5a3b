"""Load a backbone: resolve its source, refuse what cannot be used, freeze what is loaded."""

import json
from dataclasses import dataclass, field
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
from .source import (
    SourceFiles,
    looks_like_path,
    read_config,
    refuse_revision,
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
    _check_architecture(files.id, config)
    stored = stored_quantization(config)
    quantization = settle_quantization(files.id, stored, backbone.quantization)
    fingerprint = fingerprint_files(files)
    source = Source(files.id, files.revision, fingerprint, quantization, _read_notes(files))
    # Pinned to one commit and, where the Hub is out of reach, not asking it file by file.
    tokenizer = load_tokenizer(source.id, source.revision, files.local_only)
    origin = {"revision": source.revision or "main", "local_files_only": files.local_only}
    is_stored = stored is not None
    model = _load_model(backbone, source.id, torch.device(device), is_stored, **origin)
    if is_stored:
        compute_in(model, getattr(torch, backbone.dtype))
    return model, tokenizer, source


def resolve_source(id: str, revision: str | None = None) -> str:
    """Return the absolute folder, or the Hub id, that a recipe's `backbone.id` stands for.

    Dequantises a `package://` file unless its folder lies in the cache already.
    """
    if id.startswith(PACKAGE_SCHEME):
        refuse_revision(id, revision)
        return str(dequantised(id))
    path = expand(id)
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


def load_tokenizer(
    where: str, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder or Hub repository; no code from there is ever run.

    Raises:
        BackboneError: There is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where,
            revision=revision or "main",
            local_files_only=local_files_only,
            trust_remote_code=False,
        )
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
            f"{where!r} has no tokenizer that transformers can load{detail}: put the tokenizer "
            "of the model it was made from beside the weights (tokenizer.json and "
            "tokenizer_config.json, as `tokenizer.save_pretrained(FOLDER)` writes them)"
        )
    return tokenizer


def _load_model(
    backbone: BackboneConfig, id: str, device: torch.device, stored: bool, **origin: Any
) -> PreTrainedModel:
    placement: dict[str, Any] = {}
    attention = backbone.attn_implementation
    dtype = getattr(torch, backbone.dtype)
    if backbone.quantization is not None and not stored:
        config = quantization_config(backbone.quantization, backbone.dtype)
        placement["quantization_config"] = config
    if backbone.quantization is not None or stored or device.type != "cpu":
        placement["device_map"] = {"": device}  # straight to the device, not through the CPU
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            id,
            dtype=dtype,
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


def _read_notes(files: SourceFiles) -> dict[str, Any]:
    path = files.config.parent / NOTES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
