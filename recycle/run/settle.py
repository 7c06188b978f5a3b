"""What a run settles of its recipe, so that the saved one gives the same run in any place, any day.

A path becomes absolute; a revision that was left open becomes the commit that the Hub had; dtype
`auto` becomes what this hardware computes in. A branch or tag that was named stays as it is.
"""

from typing import Any

from recycle.disk import expand
from recycle.recipe import Recipe

# Fields that may be left open, and how they then read.
OPEN: dict[str, dict[str, Any]] = {
    "backbone": {"revision": None, "dtype": "auto"},
    "data": {"revision": None},
}


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with the paths of a local backbone and of local data made absolute."""
    backbone, data = recipe.backbone, recipe.data
    folder = expand(backbone.id)
    if folder.is_dir():
        backbone = backbone.model_copy(update={"id": str(folder.absolute())})
    if data.path is not None and data.source != "hub":
        path = expand(data.path).absolute()
        data = data.model_copy(update={"path": str(path)})
    return recipe.model_copy(update={"backbone": backbone, "data": data})


def settled(recipe: Recipe, found: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with what it leaves open as it was found, by section and field."""
    sections = {}
    for name, fields in OPEN.items():
        section = getattr(recipe, name)
        chosen = {f: found[name][f] for f, left in fields.items() if getattr(section, f) == left}
        sections[name] = section.model_copy(update=chosen)
    return recipe.model_copy(update=sections)


def as_before(recipe: Recipe, saved: Recipe) -> Recipe:
    """The recipe with what it leaves open as an earlier run of it settled that."""
    return settled(recipe, {name: getattr(saved, name).model_dump() for name in OPEN})
