"""What TARGET means: a recipe file, a shipped recipe, or a bare model."""

import re
from pathlib import Path

from recycle.recipe import files
from recycle.recipe.problems import RecipeError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def choose(target: str) -> tuple[Path, str | None, str]:
    """TARGET's recipe file, its bare model if it is one, and the choice in words."""
    path, names = Path(target), files.shipped()
    if path.suffix in (".yaml", ".yml") or ("/" in target and path.is_file()):
        if path.is_file():
            return path, None, f"recipe file {files.display(path)}"
        problem = f"there is no file {target}"
        if path.stem in names:
            problem += f"; the shipped recipe is called {path.stem}"
        raise RecipeError(f"target {target}", [problem])
    if target in names:
        return files.SHIPPED / f"{target}.yaml", None, f"shipped recipe '{target}'"

    default = files.SHIPPED / "default.yaml"
    if (path / "config.json").is_file():
        return default, target, f"default recipe for the model folder {target}"
    if path.is_dir() and "/" in target:
        raise RecipeError(
            f"target {target}", ["the folder holds no config.json, so it is no model"]
        )
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


def model_name(model: str) -> str:
    """The last part of a Hub id, a folder or a package file."""
    return model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def as_name(words: str) -> str:
    """Words as the name of a recipe, for those that give none."""
    return re.sub(r"[^a-z0-9._-]+", "-", words.lower()).strip("-._") or "run"
