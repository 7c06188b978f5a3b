"""The layout of the package: every room imports what stands below it, and no other."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import recycle

PACKAGE = Path(recycle.__file__).parent
# From the top floor down, as in DESIGN.
FLOORS = (
    *(
        "cli",
        "publish",
        "run",
        "serve",
        "train",
        "upstream",
        "evaluate",
        "decode",
        "family",
        "report",
    ),
    *(
        "cost",
        "law",
        "data",
        "sharding",
        "parscale",
        "backbone",
        "results",
        "recipe",
        "progress",
        "disk",
        "preemption",
        "world",
        "errors",
    ),
)
# What an application imports to use a family, and all that this may need.
RUNTIME = ("parscale", "backbone", "family")
BASE_INSTALL = {"torch", "transformers", "peft", "safetensors", "huggingface_hub"}
# Of huggingface_hub and transformers themselves; and the reader of GGUF files, where one is read.
COME_WITH_IT = {"filelock", "tokenizers", "gguf"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ["recycle", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from recycle import results` imports a room; `from .x import y` a name of a module.
            yield from (
                (f"{module}.{a.name}" for a in node.names) if module == "recycle" else [module]
            )


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_below_it(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):  # the public API, and the door to the command
        return
    below = FLOORS[FLOORS.index(room) :]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("recycle.")}
    assert used - {"__version__"} <= set(below)


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in RUNTIME], ids=str)
def test_what_an_application_imports_needs_the_base_install_only(path):
    packages = {name.partition(".")[0] for name in imports(path)} - {"recycle"}
    assert packages <= BASE_INSTALL | COME_WITH_IT | sys.stdlib_module_names
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("recycle.")}
    assert rooms <= {*RUNTIME, "disk", "errors"}


def test_every_room_has_its_floor():
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms <= set(FLOORS)
