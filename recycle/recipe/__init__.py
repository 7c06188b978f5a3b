"""Recipes: what to recycle, on which data and how, as YAML fragments that compose.

Reading order: `schema.py` (what a recipe may hold) on `values.py` (kinds of values), `files.py`
(YAML to keys with places), `target.py` (what TARGET means), `resolve.py` (include, merge, override,
check), `problems.py` (how what is wrong is said), `show.py` (back to text).
"""

from recycle.recipe.files import shipped
from recycle.recipe.problems import RecipeError
from recycle.recipe.resolve import Resolved, load, resolve
from recycle.recipe.schema import (
    Backbone,
    Data,
    Evaluation,
    Launch,
    Logging,
    Method,
    Output,
    Recipe,
    Training,
    differing_keys,
    identity,
)
from recycle.recipe.show import SAVED, dump, holds_run, show

__all__ = [
    "SAVED",
    "Backbone",
    "Data",
    "Evaluation",
    "Launch",
    "Logging",
    "Method",
    "Output",
    "Recipe",
    "RecipeError",
    "Resolved",
    "Training",
    "differing_keys",
    "dump",
    "holds_run",
    "identity",
    "load",
    "resolve",
    "shipped",
    "show",
]
