"""What TARGET means: a recipe file, a shipped recipe, a run folder, or a bare model."""

import os
import re
import shutil
import textwrap
from itertools import takewhile
from pathlib import Path

from recycle.disk import expand

from . import files
from .problems import FRAGMENTS, TEXT_FILE, RecipeError, nearest, path_hint, shorten

_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def choose(target: str) -> tuple[Path, str | None, str]:
    """TARGET's recipe file, its bare model if it is one, and the choice in words.

    Raises:
        RecipeError: It is none of these.
    """
    # Of a name that is too long for a disk, os.path says no, where Path raises.
    path, names = expand(target), files.shipped()
    default, is_folder = files.SHIPPED / "default.yaml", os.path.isdir(path)
    is_yaml = path.suffix in (".yaml", ".yml")
    if os.path.isfile(path) and (is_yaml or ("/" in target and ".jsonl" not in path.name)):
        return path, None, f"recipe file {files.display(path)}"
    if target in names:
        also = f" (for the folder of that name write ./{target})" if is_folder else ""
        return files.SHIPPED / f"{target}.yaml", None, f"shipped recipe '{target}'{also}"
    if files.holds_run(path):
        return path / files.SAVED, None, f"the run in {target}"
    if os.path.isfile(path / "config.json"):
        return default, target, f"default recipe for the model folder {target}"
    if target.startswith("package://"):
        return default, target, f"default recipe for the packaged model {target}"

    close = None if "/" in target else nearest(target, names)
    if is_yaml:
        problem = f"there is no file {target}"
        if path.stem in names:
            problem += f"; the shipped recipe is called {path.stem}"
    elif is_folder:
        problem = f"the folder {target} holds no config.json, so it is no model"
        if (path / files.SAVED).is_file():
            problem += f"; for the recipe in it write {path / files.SAVED}"
    elif TEXT_FILE.search(target):
        hint = path_hint("data", target, in_file=False)
        problem = f"text to learn from is no recipe and no model; name one first, and {hint}"
    elif close is None and _HUB_ID.fullmatch(target):
        # A bare word is a Hub id too (gpt2), unless it looks like a shipped recipe mistyped.
        return default, target, f"default recipe for the Hub model {target}"
    else:
        problem = (
            "no such file, shipped recipe, model folder or Hub id; "
            f"{f'did you mean {close}? ' if close else ''}"
            f"shipped recipes: {', '.join(names)}; a Hub id is written OWNER/NAME"
        )
    raise RecipeError(f"target {shorten(target)}", [problem])


def listing() -> str:
    """The shipped recipes and fragments, each with as much of its comment as fits into a line."""
    width = shutil.get_terminal_size((140, 24)).columns - 30
    lines = ["Recipes (recycle run NAME):"]
    for section, folder in {"": "", **{x: y for x, y in FRAGMENTS.items() if "." not in x}}.items():
        if folder:
            lines += ["", f"Fragments (include: [{folder}/NAME], or {section}=NAME):"]
        for name in files.shipped(folder):
            text = (files.SHIPPED / folder / f"{name}.yaml").read_text("utf-8")
            comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
            about = " ".join(line.removeprefix("#") for line in comment)
            lines.append(f"  {name:<28}{textwrap.shorten(about, width, placeholder=' …')}")
    return "\n".join(lines)
