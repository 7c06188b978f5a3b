"""Recipes: what to recycle, on which data and how, as YAML fragments that compose.

Reading order: `schema.py` (what a recipe may hold) on `kinds.py` (kinds of values), `fields.py`
(all keys), `files.py` (YAML to keys with places), `target.py` (what TARGET means), `resolution.py`
(include, merge, override, check), `rules.py` (between fields), `problems.py` (how what is wrong is
said), `consequences.py` (what follows from a recipe), `text.py` (back to text).
"""

from .consequences import Stage, differing_keys, identity, next_free_folder, run_folder, stages
from .files import SAVED, holds_run, shipped
from .problems import RecipeError
from .resolution import Resolved, read_recipe, resolve
from .schema import Adapt, Backbone, Data, Evaluation, Launch, Method, Part, Recipe, Training
from .target import listing
from .text import dump, show
