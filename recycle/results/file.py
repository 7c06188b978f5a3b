"""`results.json` on disk: the full record of a run, checked when it is read."""

import json
from pathlib import Path

from pydantic import ValidationError

from recycle.disk import write_atomically
from recycle.errors import RecycleError

from .schema import SCHEMA_VERSION, Results


class ResultsError(RecycleError):
    """A `results.json` that cannot be read as one."""


def write(results: Results, path: Path) -> None:
    """Write `results.json`, atomically."""
    write_atomically(path, f"{results.model_dump_json(indent=1)}\n".encode())


def read(path: Path) -> Results:
    """Read `results.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: it is damaged, of an unknown version, or does not fit the schema.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise ResultsError(
            f"{path} is damaged or incomplete ({error}). Put a copy of it back, or run the recipe "
            "again with --new"
        ) from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ResultsError(f"{path} is no record of a run. Name a run folder or its results.json")
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has schema_version {version!r}, and this version of recycle reads "
            f"{SCHEMA_VERSION}. Read it with the version of recycle that wrote it"
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(
            f"  {'.'.join(map(str, problem['loc'])) or 'results'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ResultsError(f"{path} does not fit the schema of results:\n{problems}") from None
