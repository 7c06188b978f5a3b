"""What a run settles of its recipe, so that the saved one gives the same run in any place, any day.

A path becomes absolute; a revision that was left open becomes the commit that the Hub had; dtype
`auto` becomes what this hardware computes in. A branch or tag that was named stays as it is.
"""

from collections.abc import Mapping
from typing import Any

from recycle.disk import expand
from recycle.recipe import Recipe
from recycle.recipe.fields import flatten, nest


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with the paths of local models, adapters and data made absolute."""
    values = flatten(recipe)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        local = name in ("path", "test_path") and values.get(f"{section}.source") != "hub"
        folder = key in ("backbone.id", "backbone.adapter", "stages.streams.start")
        if value and (local or (folder and expand(value).is_dir())):
            values[key] = str(expand(value).absolute())
    return Recipe.model_validate(nest(values))


def settled(recipe: Recipe, found: Mapping[str, Any]) -> Recipe:
    """The recipe with what it leaves open as it was found, by dotted key."""
    values = flatten(recipe)
    open_keys = [key for key, value in values.items() if key.endswith("revision") and not value]
    open_keys += ["backbone.dtype"] * (recipe.backbone.dtype == "auto")
    values |= {key: found[key] for key in open_keys if key in found}
    return Recipe.model_validate(nest(values))


def as_before(recipe: Recipe, saved: Recipe) -> Recipe:
    """The recipe with what it leaves open as an earlier run of it settled that."""
    return settled(recipe, flatten(saved))
