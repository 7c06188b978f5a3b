"""From TARGET and `key=value` to one recipe in which every value has an origin.

A recipe is held flat, as dotted key -> value, so that merging is the update of a dictionary. All
problems of all files and of the command line are collected and raised together.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from recycle.disk import expand

from . import files, problems
from .fields import FIELDS, MAPPINGS, OPTIONAL, SECTIONS, flatten, nest, pattern
from .files import Raw, Setting
from .problems import FRAGMENTS, RecipeError, shorten
from .rules import contradictions
from .schema import Recipe
from .target import choose

COMMAND_LINE = "command line"
RUN_FOLDER = "run folder"
DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """A recipe, where each of its values comes from, and what TARGET was taken for."""

    recipe: Recipe
    origins: dict[str, str]  # dotted key -> "recipes/models/x.yaml:3", "command line" or "default"
    chosen: str  # "shipped recipe 'demo'", "recipe file x.yaml", "default recipe for ..."
    missing: tuple[str, ...]  # paths that cannot be read; a finished run can do without them


def resolve(target: str, overrides: Sequence[str] = ()) -> Resolved:
    """Read, merge and check the recipe that `target` names.

    Args:
        target: a path (ends in .yaml or .yml, or has a `/`, exists and is no .jsonl), else the name
            of a shipped recipe, a run folder, or else a bare model (local folder with a
            config.json, `package://` file or Hub id), which gets the shipped recipe `default` with
            itself as the backbone.
        overrides: `data=NAME`, `backbone=NAME`, `training=NAME` and `stages.STAGE.data=NAME`
            replace that section by a fragment, or lay one over it that does not fill it
            (`backbone=4bit`), and come first; `key.sub=value` sets a field of the schema.

    Raises:
        RecipeError: with everything that is wrong, each with its place.
    """
    recipe_path, model, chosen = choose(target)
    draft = _Draft()
    draft.include(recipe_path)
    name = recipe_path.stem
    if recipe_path.parent == expand(target):  # a run folder, which may have moved
        draft.set(Setting("output.dir", str(recipe_path.parent.absolute()), RUN_FOLDER))
    if model is not None:
        draft.drop("backbone")
        draft.set(Setting("backbone.id", model, COMMAND_LINE))
        name = Path(model).name.removesuffix(".gguf")
    draft.override(overrides)
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "run"
    return draft.finish(chosen, files.display(recipe_path), name)


def read_recipe(path: Path | str) -> Recipe:
    """The recipe in a file, such as the one saved in a run folder."""
    return resolve(str(path)).recipe


class _Draft:
    """A recipe in the making."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.broken: set[str] = set()  # keys that were given a value that does not fit
        self.problems: list[str] = []
        self.seen: set[Path] = set()
        self.unread = False  # a file could not be parsed, so that keys may be missing for that

    def include(self, path: Path, chain: tuple[Path, ...] = (), into: str = "") -> None:
        """Merge a file after all that it includes, each file once, at its first place.

        Args:
            path: The file.
            chain: The files that include it.
            into: Where the keys of its section `data` go, if not there.
        """
        resolved = path.resolve()
        if resolved in self.seen:
            return
        self.seen.add(resolved)
        settings, found = files.parse(path)
        self.problems += found
        self.unread |= settings is None
        for setting in sorted(settings or (), key=lambda setting: setting.key != "include"):
            if setting.key == "include":
                self._include_all(setting, path, (*chain, resolved))
            elif not into:
                self.set(setting)
            elif pattern(key := setting.key.replace("data", into, 1)) in FIELDS:
                self.set(replace(setting, key=key))  # what a part of a mix does not have is left

    def _include_all(self, setting: Setting, path: Path, chain: tuple[Path, ...]) -> None:
        names = setting.value if isinstance(setting.value, list) else [setting.value]
        for name, origin in zip(names, setting.items or [setting.origin], strict=False):
            found = files.find(name, path.parent) if isinstance(name, str) and name else None
            rule, hint = "", ""
            if not isinstance(name, str) or not name:
                rule = "must list names, such as models/qwen2.5-3b"
            elif found is None:
                beside = files.display(path)
                rule = f"there is no such file beside {beside} and no such shipped name"
                fragments = [f"{d}/{n}" for d in FRAGMENTS.values() for n in files.shipped(d)]
                hint = problems.choices_hint(name, fragments)
            elif found.resolve() in chain:
                cycle = [*chain[chain.index(found.resolve()) :], found]
                rule = f"files include each other: {' -> '.join(map(files.display, cycle))}"
            else:
                self.include(found, chain)
                continue
            self._problem(origin, "include", name, rule, hint)

    def drop(self, key: str) -> None:
        for old in [old for old in self.values if old.startswith(f"{key}.")]:
            del self.values[old]

    def override(self, overrides: Sequence[str]) -> None:
        """Apply the command line: fragments first, then fields in the order given."""
        pairs: dict[str, str] = {}
        for text in overrides:
            key, equals, value = (part.strip() for part in text.partition("="))
            if not equals or not key:
                self.problems.append(f"{COMMAND_LINE}: {text}: must be written key=value")
            elif key in pairs:
                self._problem(COMMAND_LINE, key, value, "duplicate key; give it once")
            else:
                pairs[key] = value
        sections = [x for x in pairs if pattern(x) in FRAGMENTS and self._named(x, pattern(x))]
        for section in sections:
            self._pick(Setting(section, pairs.pop(section), COMMAND_LINE))
        for key, value in pairs.items():
            null = value in ("", "~", "null", "Null", "NULL")
            self.set(Setting(key, None if null else value, COMMAND_LINE))

    def _pick(self, setting: Setting) -> None:
        section, name = setting.key, str(setting.value)
        folder = FRAGMENTS[pattern(section)]
        names = files.shipped(folder)
        if name not in names:
            in_file = setting.origin != COMMAND_LINE
            hint = problems.path_hint(section, name, in_file) or problems.choices_hint(name, names)
            rule = f"there is no fragment {folder}/{name}"
            self._problem(setting.origin, section, name, rule, hint)
            return
        if "." in section or files.is_whole(folder, name, section):
            self.drop(section)
        self.seen.clear()  # what was merged before may be merged again, now that it comes later
        into = section if "." in section else ""
        self.include(files.SHIPPED / folder / f"{name}.yaml", into=into)

    def set(self, setting: Setting) -> None:
        """Check one setting against the schema and take it, or note what is wrong."""
        key, raw, origin = setting.key, setting.value, setting.origin
        field = pattern(key)
        named = field.endswith(".*") or ".*." in field
        if "." in key and field in FRAGMENTS and isinstance(raw, str) and self._named(key, field):
            self._pick(setting)
        elif field in SECTIONS and self._named(key, field):
            hint = problems.path_hint(
                key, raw, in_file=origin != COMMAND_LINE
            ) or problems.section_hint(key)
            self._problem(origin, key, raw, "is a section, no value", hint)
        elif named and not self._named(key, field):
            rule = "must be a number of streams, such as 4"
            if "mix" in field:
                rule = "must hold a-z, 0-9, '.', '_' and '-' only"
            self._problem(origin, key, raw, f"the key {rule}")
        elif field not in FIELDS:
            self._problem(origin, key, raw, "unknown key", problems.key_hint(key))
        elif key in MAPPINGS and raw is None:
            self.drop(key)  # null empties a mapping; anything else would merge into it
        elif key in MAPPINGS:
            self._problem(origin, key, raw, "is a mapping", f"write {key}.KEY=value, or null")
        else:
            self._take(setting, field)

    @staticmethod
    def _named(key: str, field: str) -> bool:
        """Whether the entry of a mapping that a key is of, if any, has a name that fits."""
        at = next((i for i, part in enumerate(field.split(".")) if part == "*"), None)
        if at is None:
            return True
        form = "[a-z0-9][a-z0-9_-]*" if "mix" in field else "[1-9][0-9]*"
        return re.fullmatch(form, key.split(".")[at]) is not None

    def _take(self, setting: Setting, field: str) -> None:
        key, origin = setting.key, setting.origin
        self.broken.add(key)
        self.values.pop(key, None)
        if isinstance(setting.value, dict):
            self._problem(origin, key, setting.value, "takes a value, not a mapping")
            return
        try:
            value = _adapter(field).validate_python(setting.value)
        except ValidationError as error:
            for detail in error.errors():
                index = next((part for part in detail["loc"] if isinstance(part, int)), None)
                if index is not None and setting.items:
                    origin = setting.items[index]
                self._problem(origin, key, setting.value, *problems.reword(detail))
        else:
            self.broken.discard(key)
            self.values[key], self.origins[key] = value, origin

    def _problem(self, origin: str, key: str, value: Raw, rule: str, hint: str = "") -> None:
        given = "" if isinstance(value, dict) else f" = {shorten(value)}"
        self.problems.append(f"{origin}: {key}{given}: {rule}{'; ' if hint else ''}{hint}")

    def finish(self, subject: str, place: str, name: str) -> Resolved:
        """Fill in defaults, check fields against each other, and build the recipe."""
        chosen = set(self.values)
        for key, info in list(self._fields()):
            if key in self.values or key in self.broken or key in MAPPINGS:
                continue
            if key == "name" or not info.is_required():
                self.values[key] = name if key == "name" else info.get_default()
                self.origins[key] = DEFAULT
            elif not self.unread:
                also = problems.fragment_hint(key.rpartition(".")[0])
                self.problems.append(f"{place}: {key}: missing, and has no default{also}")
        self._follow(chosen)
        for keys, rule in () if self.unread else contradictions(self.values, chosen):
            given = [
                f"{key} = {shorten(self.values.get(key))} ({self.origins.get(key, DEFAULT)})"
                for key in keys
            ]
            self.problems.append(f"{', '.join(given)}: {rule}")
        missing = tuple(self._missing_paths())
        if self.problems:
            raise RecipeError(subject, [*self.problems, *missing])
        recipe = Recipe.model_validate(nest(self.values))
        origins = {key: self.origins.get(key, DEFAULT) for key in flatten(recipe)}
        return Resolved(recipe, origins, subject, missing)

    def _fields(self) -> Iterator[tuple[str, FieldInfo]]:
        """The keys that this recipe has: in place of a mapping's `*`, its own keys."""
        for field, info in FIELDS.items():
            mapping, star, rest = field.partition(".*")
            there = [key for key in (*self.values, *self.broken) if key.startswith(f"{mapping}.")]
            if not star:
                inside = [x for x in OPTIONAL if field.startswith(f"{x}.")]
                if not inside or any(x.startswith(f"{inside[0]}.") for x in self.values):
                    yield field, info
            elif rest:
                at = mapping.count(".") + 1
                for name in dict.fromkeys(key.split(".")[at] for key in there):
                    yield f"{mapping}.{name}{rest}", info

    def _follow(self, chosen: Collection[str]) -> None:
        """Defaults that follow from what was chosen."""
        values = self.values
        adapted = next(
            (x for x in ("backbone.adapter", "stages.streams.start") if values.get(x)), None
        )
        trains_all = values.get("stages.streams.train") == "all"
        tokens = [values.get(f"stages.{stage}.tokens") for stage in ("adapt", "streams")]
        both = None if None in tokens else "the tokens of both stages"
        for key, value, cause in (
            ("training.tokens", sum(x or 0 for x in tokens), both),
            ("stages.adapt.train", "none", adapted),
            ("stages.streams.control", False, "stages.streams.train" if trains_all else None),
        ):
            if cause is not None and key not in chosen:
                values[key], self.origins[key] = value, f"{DEFAULT} with {cause}"

    def _missing_paths(self) -> Iterator[str]:
        """Paths that are set and that the disk shows to be wrong, and a package."""
        paths = {"backbone.id": "model", "backbone.adapter": "adapter"}
        paths["stages.streams.start"] = "family"
        for key in self.values:
            section, _, name = key.rpartition(".")
            if name in ("path", "test_path"):
                paths[key] = self.values.get(f"{section}.source", "")
        for key, kind in paths.items():
            value = self.values.get(key)
            if kind and value and (problem := problems.path_problem(kind, value)):
                yield f"{self.origins[key]}: {key} = {value}: {problem}"
        if problem := problems.package_problem(self.values.get("logging.to", "none")):
            yield f"{self.origins['logging.to']}: logging.to = {problem}"


@cache
def _adapter(field: str) -> TypeAdapter[Any]:
    """Checks one value of a field."""
    info = FIELDS[field]
    kind: Any = Annotated[info.annotation, info]
    return TypeAdapter(kind)
