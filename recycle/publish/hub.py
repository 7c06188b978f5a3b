"""A run's files in one commit of a repository on the Hub."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from recycle.family.record import FAMILY_FILE

from .contents import PublicationError, contents

# Of a family: what an earlier push left there, and this run lacks, would be loaded with it.
OWN = re.compile(r"(p\d+|control|adapted|backbone)/.+")


def push(run: Path, name: str, private: bool, console: Console) -> str:
    """Upload a finished run.

    A repository that holds a family gets a new commit, in which files of other P are deleted.

    Args:
        run: Its folder.
        name: "owner/name".
        private: Whether a new repository is.
        console: Where is said what happens.

    Returns:
        The address of the commit.

    Raises:
        PublicationError: The run, the name or the token is not right, or the Hub is out of reach;
            nothing was uploaded then.
    """
    token = _checked(name)
    files = contents(run, name)
    api = HfApi(token=token)
    try:
        owner = api.whoami()["name"]
        exists = api.repo_exists(name)
        if not exists:
            api.create_repo(name, private=private)
        there = api.list_repo_files(name) if exists else []
        if FAMILY_FILE not in there and not {".gitattributes", "README.md"}.issuperset(there):
            raise PublicationError(
                f"{name} holds no family (it has no {FAMILY_FILE}), but other files. Name another "
                "repository."
            )
        if exists and private and not api.repo_info(name).private:
            raise PublicationError(
                f"{name} exists and is public. Make it private on the Hub first, or leave out "
                "--private."
            )
        size = sum(len(x) if isinstance(x, bytes) else x.stat().st_size for x in files.values())
        what = "exists and gets a new commit" if exists else "is new"
        console.print(f"{name} {what}: {len(files)} files, {size / 1e6:,.1f} MB, as {owner}")
        old = [x for x in there if OWN.fullmatch(x) and x not in files]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(file, content) for file, content in files.items()),
                *(CommitOperationDelete(file) for file in old),
            ],
            commit_message="Publish a family of recycle",
        )
    except (HTTPError, OSError, ValueError) as error:
        raise PublicationError(_reason(error, name)) from None
    return str(commit.commit_url)


def _checked(name: str) -> str:
    """The token; refuse what can be told without the network."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublicationError(f"{name!r} is no name for a repository: {error}") from None
    if "/" not in name:
        raise PublicationError(f"Name the repository OWNER/NAME, got {name!r}.")
    if constants.HF_HUB_OFFLINE:
        raise PublicationError("HF_HUB_OFFLINE is set, and push needs the Hub. Unset it.")
    token = get_token()
    if token is None:
        raise PublicationError(
            "There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write."
        )
    return token


def _reason(error: Exception, name: str) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "The Hub does not know the token. Log in again with `hf auth login`."
    if status == 403:
        return (
            f"The token may not write to {name}. Take one with write access, or another OWNER; "
            "`hf auth whoami` says whose it is."
        )
    if status is None and isinstance(error, HTTPError | ConnectionError):
        return f"The Hub cannot be reached ({line}). Connect, and push again."
    return f"The Hub did not take {name} ({line}). Push again."
