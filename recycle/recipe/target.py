"""What TARGET means: a recipe file, a shipped recipe, or a bare model."""

import glob
import os
import re
from pathlib import Path

from recycle.disk import expand

from . import files
from .problems import FRAGMENTS, RecipeError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def choose(target: str) -> tuple[Path, str | None, str]:
    """TARGET's recipe file, its bare model if it is one, and the choice in words."""
    path, names = expand(target), files.shipped()
    if path.suffix in (".yaml", ".yml") or ("/" in target and path.is_file()):
        if path.is_file():
            return path, None, f"recipe file {files.display(path)}"
        problem = f"there is no file {target}"
        if path.stem in names:
            problem += f"; the shipped recipe is called {path.stem}"
        raise RecipeError(f"target {target}", [problem])
    if target in names:
        also = f" (for the folder of that name write ./{target})" if path.is_dir() else ""
        return files.SHIPPED / f"{target}.yaml", None, f"shipped recipe '{target}'{also}"

    default = files.SHIPPED / "default.yaml"
    if (path / "config.json").is_file():
        return default, target, f"default recipe for the model folder {target}"
    if path.is_dir():
        problem = f"the folder {target} holds no config.json, so it is no model"
        if (path / "recipe.yaml").is_file():
            problem = (
                f"{target} is a run folder; to go on with it or see its results, name its recipe, "
                f"{path / 'recipe.yaml'}; to measure it again, `recycle eval {target}`"
            )
        raise RecipeError(f"target {target}", [problem])
    if target.startswith("package://"):
        return default, target, f"default recipe for the packaged model {target}"
    # A bare word is a Hub id too (gpt2), unless it looks like a shipped recipe mistyped.
    close = None if "/" in target else nearest(target, names)
    if close is None and _HUB_ID.fullmatch(target):
        return default, target, f"default recipe for the Hub model {target}"
    guess = f"did you mean {close}? " if close else ""
    problem = (
        "no such file, shipped recipe, model folder or Hub id; "
        f"{guess}shipped recipes: {', '.join(names)}; a Hub id is written OWNER/NAME"
    )
    raise RecipeError(f"target {target}", [problem])


def listing() -> str:
    """The shipped recipes and fragments, each with what it is."""
    lines = ["Recipes (recycle run NAME):"]
    for folder in ("", *FRAGMENTS.values()):
        if folder:
            section = next(name for name, place in FRAGMENTS.items() if place == folder)
            lines += ["", f"Fragments (include: [{folder}/NAME], or {section}=NAME):"]
        for name in files.shipped(folder):
            comment = (files.SHIPPED / folder / f"{name}.yaml").read_text().splitlines()[0]
            about = comment.removeprefix("#").strip().partition(". ")[0].rstrip(".:")
            lines.append(f"  {name:<28}{about}")
    return "\n".join(lines)


def names_path(value: str) -> bool:
    """Whether a backbone can only be a path: a Hub id is `name` or `owner/name`."""
    return value.startswith((".", "~", os.sep)) or (
        value.count("/") > 1 and not value.startswith("package://")
    )


def is_there(value: str) -> bool:
    """Whether a path, or a glob, names something."""
    path = os.path.expanduser(value)
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def model_name(model: str) -> str:
    """The last part of a Hub id, a folder or a package file."""
    return model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def as_name(words: str) -> str:
    """Words as the name of a recipe, for those that give none."""
    return re.sub(r"[^a-z0-9._-]+", "-", words.lower()).strip("-._") or "run"
