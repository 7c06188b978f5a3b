"""Where a backbone's files lie: a folder, or the Hub's cache, filled if needed.

Only config.json and safetensors are looked for: nothing that runs code when it is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from recycle.disk import expand, read_json_object

from .errors import BackboneError, first_line

CONFIG = "config.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Every file that a tokenizer may need; nothing that runs code.
TOKENIZER_FILES = (
    *("token*.json", "tekken.json", "vocab*.json", "vocab*.txt", "vocab.bpe", "merges*.txt"),
    *("special_tokens*.json", "added_tokens*.json", "bpe.codes", "emoji.json"),
    *("chat_template*.json", "chat_template*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.model.v*", "*.spm", "*.tiktoken"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WITHOUT_WEIGHTS = (CONFIG, "generation_config.json", ADAPTER, INDEX, *TOKENIZER_FILES)
# What to do about an error of the Hub's library; the first kind that fits.
_REASONS: dict[type[Exception], str] = {
    HFValidationError: "no such folder: {repo!r}; name a folder, or a Hub id such as "
    "'Qwen/Qwen2.5-3B'",
    GatedRepoError: "access to model {repo!r} is gated: accept its terms on its page of the Hub, "
    "then log in with `hf auth login`",
    RevisionNotFoundError: "model {repo!r} has no revision {revision!r}: take a branch, tag or "
    "commit",
    RepositoryNotFoundError: "the Hub has no model {repo!r}, or it is private, and there is no "
    "such folder: check the spelling, or log in with `hf auth login`",
    LocalEntryNotFoundError: "cannot reach the Hub, and its cache does not hold {what} of model "
    "{repo!r}: connect to the network (and unset HF_HUB_OFFLINE), or name a folder",
    Exception: "model {repo!r} cannot be fetched from the Hub ({line}): try again",
}


class Access(TypedDict, total=False):
    """How the Hub is reached, in the words of its library."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


ANYONE: Access = {}


@dataclass(frozen=True)
class SourceFiles:
    """Where a backbone's files lie on this machine."""

    id: str
    """Hub id or absolute folder."""
    revision: str | None
    """Commit on the Hub, None for a folder."""
    folder: Path
    """With the configuration, the weights and all that the tokenizer needs."""
    weights: tuple[Path, ...]

    @property
    def config(self) -> Path:
        return self.folder / CONFIG


def source_files(
    source: str | os.PathLike[str], revision: str | None = None, access: Access = ANYONE
) -> SourceFiles:
    """Find config.json and the safetensors files of a folder or Hub id; see `fingerprint`."""
    folder = fetched(source, revision, WITHOUT_WEIGHTS, access).absolute()
    id, commit, name = str(folder), None, repr(str(folder))
    if not expand(source).is_dir():  # <cache>/models--owner--name/snapshots/<commit>
        id, commit, name = str(source), folder.name, f"model {str(source)!r}"

    def require(file: str, problem: str) -> None:
        if (folder / file).is_file():
            return
        if commit is not None and not _reached(id, commit, access):  # perhaps the Hub has it
            reason = _REASONS[LocalEntryNotFoundError]
            raise BackboneError(reason.format(repo=id, what=repr(file)))
        raise BackboneError(problem)

    has_adapter = (folder / ADAPTER).is_file()
    hint = "; it holds a PEFT adapter, name the model it was trained on" if has_adapter else ""
    require(CONFIG, f"not a model that transformers can load, it has no config.json: {name}{hint}")
    if has_adapter:
        raise BackboneError(
            f"{name} holds a PEFT adapter ({ADAPTER}) beside the model, which transformers would "
            "apply unasked: name the model without it, or merge it and save the result"
        )
    fetched(source, commit, (CONFIG, SINGLE), access)  # the second, where there is one
    weights = [SINGLE]
    if not (folder / SINGLE).is_file():
        has_bin = any(folder.glob("*.bin"))
        found = "; it has only pickled weights (.bin), which can run code when they are read"
        require(
            INDEX,
            f"weights must be safetensors ({SINGLE}, or shards with {INDEX}), and there are none "
            f"in {name}{found * has_bin}: take a revision with safetensors, or convert with "
            "`model.save_pretrained(FOLDER)`",
        )
        weights = _shards(folder / INDEX)
        fetched(source, commit, weights, access)
    for file in weights:
        require(file, f"{INDEX} names {file!r}, which is missing in {name}")
    return SourceFiles(id, commit, folder, tuple(folder / file for file in weights))


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
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), **access)
        )
    except (HTTPError, HFValidationError, OSError) as error:
        reason = next(text for kind, text in _REASONS.items() if isinstance(error, kind))
        words = {"repo": repo, "revision": revision, "what": "the files", "line": first_line(error)}
        raise BackboneError(reason.format(**words)) from None


def refuse_revision(source: str, revision: str | None) -> None:
    """Raise `BackboneError` where a revision is given of what is not on the Hub."""
    if revision is not None:
        raise BackboneError(
            f"a revision belongs to a Hub id, and {source!r} is here on disk: leave out the "
            f"revision ({revision!r})"
        )


def read_config(files: SourceFiles) -> dict[str, Any]:
    """Read config.json as it is written."""
    return read_json_object(files.config, BackboneError)


def _reached(repo: str, revision: str, access: Access) -> bool:
    """Whether the Hub answers; asked once, and without the retries of a download."""
    if access.get("local_files_only"):
        return False
    try:
        HfApi().model_info(repo, revision=revision, timeout=10, token=access.get("token"))
    except (HTTPError, OSError):  # no network, or a Hub that is down
        return False
    return True


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(read_json_object(index, BackboneError)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise BackboneError(f"{index} has no 'weight_map'; get the file anew") from None
