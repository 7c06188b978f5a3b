"""Where a backbone's files lie: a folder, or the Hub's cache, filled if needed.

Only config.json and safetensors are looked for: nothing that runs code when it is read.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from recycle.disk import expand

from .errors import BackboneError, first_line

ADAPTER = "adapter_config.json"
# Every file that a tokenizer may need; nothing that runs code.
TOKENIZER_FILES = (
    *("token*.json", "tekken.json", "vocab*.json", "vocab*.txt", "vocab.bpe", "merges*.txt"),
    *("special_tokens*.json", "added_tokens*.json", "bpe.codes", "emoji.json"),
    *("chat_template*.json", "chat_template*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.model.v*", "*.spm", "*.tiktoken"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Access(TypedDict, total=False):
    """How the Hub is reached, in the words of its library."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


ANYONE: Access = {}
_HUB_ERRORS = (HTTPError, HFValidationError, LocalEntryNotFoundError)


@dataclass(frozen=True)
class SourceFiles:
    """Where a backbone's files lie on this machine."""

    id: str
    revision: str | None
    config: Path
    weights: tuple[Path, ...]
    local_only: bool = False
    """The Hub could not be reached: what else is loaded must come from its cache."""


def source_files(
    source: str | os.PathLike[str], revision: str | None = None, access: Access = ANYONE
) -> SourceFiles:
    """Find config.json and the safetensors files of a folder or Hub id; see `fingerprint`."""
    folder = expand(source)
    if folder.is_dir():
        refuse_revision(str(source), revision)
        folder = folder.absolute()
        return SourceFiles(str(folder), None, *_in_folder(folder))
    if looks_like_path(str(source)):
        raise BackboneError(
            f"no such folder: {str(source)!r}; a backbone is a folder with config.json and "
            "safetensors, or a Hub id such as 'Qwen/Qwen2.5-3B'"
        )
    return _on_hub(str(source), revision, access)


def fetched(
    source: str | os.PathLike[str],
    revision: str | None,
    patterns: Sequence[str],
    access: Access = ANYONE,
) -> Path:
    """The local folder that `source` is or, of a Hub id, that its files are downloaded to.

    Args:
        source: A folder or a Hub id.
        revision: Branch, tag or commit on the Hub; None for a folder.
        patterns: Names of the files to download.
        access: How the Hub is reached.

    Raises:
        BackboneError: It is neither, or cannot be fetched.
    """
    folder, repo = expand(source), str(source)
    if folder.is_dir():
        refuse_revision(repo, revision)
        return folder
    if looks_like_path(repo):
        raise BackboneError(f"no such folder: {repo!r}; name a folder or a Hub id")
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), **access)
        )
    except (*_HUB_ERRORS, OSError) as error:
        raise BackboneError(_reason(error, repo, revision)) from None


def refuse_revision(source: str, revision: str | None) -> None:
    """Raise `BackboneError` where a revision is given of what is not on the Hub."""
    if revision is not None:
        raise BackboneError(
            f"a revision belongs to a Hub id, and {source!r} is here on disk: leave out the "
            f"revision ({revision!r})"
        )


def looks_like_path(source: str) -> bool:
    """Whether `source` can only mean a path: a Hub id is `name` or `owner/name`."""
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or "\\" in source


def read_config(files: SourceFiles) -> dict[str, Any]:
    """Read config.json as it is written."""
    config = _read_json(files.config)
    if not isinstance(config, dict):
        raise BackboneError(f"{files.config} must hold a JSON object; get the file anew")
    return config


def _in_folder(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    config = folder / "config.json"
    if not config.is_file():
        adapter = (folder / ADAPTER).is_file()
        hint = "; it holds a PEFT adapter, name the model it was trained on" if adapter else ""
        raise BackboneError(f"not a model folder, it has no config.json: {str(folder)!r}{hint}")
    if (folder / ADAPTER).is_file():
        raise BackboneError(_has_adapter(str(folder)))
    if (folder / SINGLE).is_file():
        return config, (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        raise BackboneError(_no_safetensors(str(folder), any(folder.glob("*.bin"))))
    weights = tuple(folder / shard for shard in _shards(folder / INDEX))
    for path in weights:
        if not path.is_file():
            raise BackboneError(f"{INDEX} names {path.name!r}, which is missing in {str(folder)!r}")
    return config, weights


def _on_hub(repo: str, revision: str | None, access: Access) -> SourceFiles:
    reached = not access.get("local_files_only") and _reach(repo, revision, access.get("token"))
    access = {**access, "local_files_only": not reached}
    config = _download(repo, revision, "config.json", access)
    if config is None:
        raise BackboneError(
            f"not a model that transformers can load, it has no config.json: {_named(repo)}"
        )
    if (config.parent / ADAPTER).exists():
        raise BackboneError(_has_adapter(_named(repo)))
    commit = config.parent.name  # <cache>/models--owner--name/snapshots/<commit>/config.json
    names = [SINGLE]
    weights = [_download(repo, commit, SINGLE, access)]
    if weights == [None]:
        index = _download(repo, commit, INDEX, access)
        if index is None:
            raise BackboneError(_no_safetensors(_named(repo)))
        names = _shards(index)
        weights = [_download(repo, commit, shard, access) for shard in names]
    if None in weights:
        missing = names[weights.index(None)]
        raise BackboneError(f"{INDEX} names {missing!r}, which is missing in {_named(repo)}")
    return SourceFiles(repo, commit, config, tuple(path for path in weights if path), not reached)


def _reach(repo: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the Hub can be reached; raises if it has no such model or revision.

    Asked once and first: each later question to a Hub out of reach would cost its retries.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=10, token=token)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BackboneError(_reason(error, repo, revision)) from None
    except (HTTPError, OSError):  # no network, or a Hub that is down
        return False
    if any(file.rfilename == ADAPTER for file in info.siblings or []):
        raise BackboneError(_has_adapter(_named(repo)))
    return True


def _has_adapter(where: str) -> str:
    return (
        f"{where} holds a PEFT adapter ({ADAPTER}) beside the model, which transformers would "
        "apply unasked: name the model without it, or merge it and save the result"
    )


def _download(repo: str, revision: str | None, filename: str, access: Access) -> Path | None:
    """Return the file in the Hub's cache, downloaded if needed; None if the model has no such."""
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, **access))
    except (*_HUB_ERRORS, OSError) as error:
        away = isinstance(error, LocalEntryNotFoundError)
        if (isinstance(error, EntryNotFoundError) and not away) or (away and filename == SINGLE):
            return None  # a model in shards: ask for its index
        raise BackboneError(_reason(error, repo, revision, repr(filename))) from None


def _reason(error: Exception, repo: str, revision: str | None, what: str = "the files") -> str:
    """What to do about an error of the Hub's library."""
    match error:
        case HFValidationError():
            return (
                f"neither a folder nor a Hub id: {repo!r}; a backbone is a folder with config.json "
                "and safetensors, or a Hub id such as 'Qwen/Qwen2.5-3B'"
            )
        case GatedRepoError():
            return (
                f"access to {_named(repo)} is gated: accept its terms on its page of the Hub, then "
                "log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return f"{_named(repo)} has no revision {revision!r}: take a branch, tag or commit"
        case RepositoryNotFoundError():
            return (
                f"the Hub has no {_named(repo)}, or it is private, and there is no such folder: "
                "check the spelling, or log in with `hf auth login`"
            )
        case LocalEntryNotFoundError():
            return (
                f"cannot reach the Hub, and its cache does not hold {what} of {_named(repo)}: "
                "connect to the network (and unset HF_HUB_OFFLINE), or name a folder"
            )
    return f"{_named(repo)} cannot be fetched from the Hub ({first_line(error)}): try again"


def _named(repo: str) -> str:
    return f"model {repo!r}"


def _no_safetensors(where: str, has_bin: bool = False) -> str:
    found = "; it has only pickled weights (.bin), which can run code when they are read" * has_bin
    return (
        f"weights must be safetensors ({SINGLE}, or shards with {INDEX}), and there are none in "
        f"{where}{found}: take a revision with safetensors, or convert with "
        "`model.save_pretrained(FOLDER)`"
    )


def _shards(index: Path) -> list[str]:
    content = _read_json(index)
    try:
        return sorted(set(content["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise BackboneError(f"{index} has no 'weight_map'; get the file anew") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise BackboneError(f"{path} is not valid JSON ({error}); get the file anew") from None
