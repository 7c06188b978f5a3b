"""Where a backbone's files lie: a folder, or the Hub's cache, filled if needed.

Only config.json and safetensors are looked for: nothing that runs code when it is read.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from recycle.disk import expand
from recycle.errors import RecycleError

ADAPTER = "adapter_config.json"
# Every file that a tokenizer may need; nothing that runs code.
TOKENIZER_FILES = (
    *("token*.json", "vocab*.json", "vocab*.txt", "merges*.txt", "special_tokens*.json"),
    *("added_tokens*.json", "chat_template*", "additional_chat_templates/*.jinja"),
    *("*.model", "*.tiktoken"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Access(TypedDict, total=False):
    """How the Hub is reached, in the words of its library."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


ANYONE: Access = {}


class SourceError(RecycleError):
    """A backbone's source cannot be read; the message says why and what to do."""


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
        if revision is not None:
            raise SourceError(
                f"a revision belongs to a Hub id, but {str(source)!r} is a folder: "
                f"leave out the revision ({revision!r})"
            )
        folder = folder.absolute()
        return SourceFiles(str(folder), None, *_in_folder(folder))
    if looks_like_path(str(source)):
        raise SourceError(
            f"no such folder: {str(source)!r}; a backbone is a folder with config.json and "
            "safetensors, or a Hub id such as 'Qwen/Qwen2.5-3B'"
        )
    return _on_hub(str(source), revision, access)


def looks_like_path(source: str) -> bool:
    """Whether `source` can only mean a path: a Hub id is `name` or `owner/name`."""
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or "\\" in source


def read_config(files: SourceFiles) -> dict[str, Any]:
    """Read config.json as it is written."""
    config = _read_json(files.config)
    if not isinstance(config, dict):
        raise SourceError(f"{files.config} must hold a JSON object; get the file anew")
    return config


def _in_folder(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    config = folder / "config.json"
    if not config.is_file():
        adapter = (folder / ADAPTER).is_file()
        hint = "; it holds a PEFT adapter, name the model it was trained on" if adapter else ""
        raise SourceError(f"not a model folder, it has no config.json: {str(folder)!r}{hint}")
    if (folder / ADAPTER).is_file():
        raise SourceError(_has_adapter(str(folder)))
    if (folder / SINGLE).is_file():
        return config, (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        raise SourceError(_no_safetensors(str(folder), any(folder.glob("*.bin"))))
    weights = tuple(folder / shard for shard in _shards(folder / INDEX))
    for path in weights:
        if not path.is_file():
            raise SourceError(f"{INDEX} names {path.name!r}, which is missing in {str(folder)!r}")
    return config, weights


def _on_hub(repo: str, revision: str | None, access: Access) -> SourceFiles:
    reached = not access.get("local_files_only") and _reach(repo, revision, access.get("token"))
    access = {**access, "local_files_only": not reached}
    config = _download(repo, revision, "config.json", access)
    if config is None:
        raise SourceError(
            f"not a model that transformers can load, it has no config.json: {_named(repo)}"
        )
    if (config.parent / ADAPTER).exists():
        raise SourceError(_has_adapter(_named(repo)))
    commit = config.parent.name  # <cache>/models--owner--name/snapshots/<commit>/config.json
    names = [SINGLE]
    weights = [_download(repo, commit, SINGLE, access)]
    if weights == [None]:
        index = _download(repo, commit, INDEX, access)
        if index is None:
            raise SourceError(_no_safetensors(_named(repo)))
        names = _shards(index)
        weights = [_download(repo, commit, shard, access) for shard in names]
    if None in weights:
        missing = names[weights.index(None)]
        raise SourceError(f"{INDEX} names {missing!r}, which is missing in {_named(repo)}")
    return SourceFiles(repo, commit, config, tuple(path for path in weights if path), not reached)


def _reach(repo: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the Hub can be reached; raises if it has no such model or revision.

    Asked once and first: each later question to a Hub out of reach would cost its retries.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=10, token=token)
    except HFValidationError:
        reason = (
            f"neither a folder nor a Hub id: {repo!r}; a backbone is a folder with config.json "
            "and safetensors, or a Hub id such as 'Qwen/Qwen2.5-3B'"
        )
    except GatedRepoError:
        reason = _gated(repo)
    except RevisionNotFoundError:
        reason = f"{_named(repo)} has no revision {revision!r}; take a branch, tag or commit of it"
    except RepositoryNotFoundError:
        reason = (
            f"the Hub has no {_named(repo)}, or it is private, and there is no such folder: "
            "check the spelling, or log in with `hf auth login`"
        )
    except (HTTPError, OSError):  # no network, or a Hub that is down
        return False
    else:
        if all(file.rfilename != ADAPTER for file in info.siblings or []):
            return True
        reason = _has_adapter(_named(repo))
    raise SourceError(reason)


def _has_adapter(where: str) -> str:
    return (
        f"{where} holds a PEFT adapter ({ADAPTER}) beside the model, which transformers would "
        "apply unasked: name the model without it, or merge it and save the result"
    )


def _download(repo: str, revision: str | None, filename: str, access: Access) -> Path | None:
    """Return the file in the Hub's cache, downloaded if needed; None if the model has no such."""
    try:
        path = hf_hub_download(repo, filename, revision=revision, **access)
    except LocalEntryNotFoundError:
        if filename == SINGLE:  # not in the cache, as with a model in shards: ask for its index
            return None
        what = repr(filename) if filename == "config.json" else "the weights"
        reason = (
            f"cannot reach the Hub, and its cache does not hold {what} of {_named(repo)}: "
            "connect to the network (and unset HF_HUB_OFFLINE), or name a folder"
        )
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        reason = _gated(repo)
    except HfHubHTTPError as error:
        reason = f"the Hub answered {error.response.status_code} for {_named(repo)}: try again"
    else:
        return Path(path)
    raise SourceError(reason)


def _gated(repo: str) -> str:
    return (
        f"access to {_named(repo)} is gated: accept its terms on its page of the Hub, then "
        "log in with `hf auth login`"
    )


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
        raise SourceError(f"{index} has no 'weight_map'; get the file anew") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON ({error}); get the file anew") from None
