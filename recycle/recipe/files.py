"""Recipe files: where they are found, and how YAML becomes keys with a place.

Only YAML's structure is used: every scalar stays the text that was written, and the schema says
whether it is a number, a word or a text. So `20M` and `2e-5` are numbers wherever a number is
expected, `yes` is never a boolean, and a commit id such as `1e10` stays a text. Nothing that a
file names is ever constructed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .fields import FIELDS, MAPPINGS, SECTIONS, pattern

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package recipes lie inside it, in a checkout beside it.
_INSTALLED = _PACKAGE / "_recipes"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "recipes"

SAVED = "recipe.yaml"
MARK = "# The resolved recipe of the run in this folder, written by recycle.\n"

_PLAIN_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")

# A value as written: text, null, list, or an empty mapping for any mapping.
Raw = str | None | dict[str, str] | list["Raw"]


@dataclass(frozen=True)
class Setting:
    """One `key: value` of a file or of the command line, not yet checked."""

    key: str  # dotted
    value: Raw
    origin: str  # "recipes/models/x.yaml:3" or "command line"
    items: tuple[str, ...] = ()  # origins of a list's items


def shipped(folder: str = "") -> list[str]:
    """Names of the shipped recipes, or of the fragments in one folder (`models`, `data`, ...)."""
    return sorted(path.stem for path in (SHIPPED / folder).glob("*.yaml"))


def is_whole(folder: str, name: str, section: str) -> bool:
    """Whether a shipped fragment fills its section; one that does not is laid over another."""
    settings, _ = parse(SHIPPED / folder / f"{name}.yaml")
    fields = {key: info for key, info in FIELDS.items() if key.startswith(f"{section}.")}
    required = {key for key, info in fields.items() if info.is_required() and "*" not in key}
    return required <= {setting.key for setting in settings or ()}


def holds_run(folder: Path) -> bool:
    """Whether a folder is a run's: its recipe.yaml is one that `dump` wrote, and not a user's."""
    try:
        with (folder / SAVED).open(encoding="utf-8", errors="replace") as file:
            return file.readline() == MARK
    except OSError:
        return False


def display(path: Path) -> str:
    """A file's name for messages: `recipes/...` for a shipped one, else as short as it goes."""
    for root, prefix in ((SHIPPED, "recipes/"), (Path.cwd(), "")):
        if path.resolve().is_relative_to(root.resolve()):
            return prefix + path.resolve().relative_to(root.resolve()).as_posix()
    return str(path)


def find(name: str, beside: Path) -> Path | None:
    """The file that an include names: relative to the folder `beside`, else a shipped name."""
    places = (folder / file for folder in (beside, SHIPPED) for file in (name, f"{name}.yaml"))
    return next((place for place in places if os.path.isfile(place)), None)


def parse(path: Path) -> tuple[list[Setting] | None, list[str]]:
    """The settings of one file in order, `include` among them, and what is wrong with it.

    There are no settings, rather than none, where the file cannot be parsed at all.
    """
    shown = display(path)
    try:
        root = YAML(typ="safe", pure=True).compose(path.read_text("utf-8-sig"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return None, [f"{shown}{line}: not valid YAML: {error.problem or error.context}"]
    except YAMLError as error:
        return None, [f"{shown}: not valid YAML: {str(error).splitlines()[0]}"]
    except RecursionError:
        return None, [f"{shown}: not valid YAML: nested too deeply"]
    except UnicodeDecodeError as error:
        return None, [f"{shown}: not text in UTF-8: {error.reason} at byte {error.start}"]
    except OSError as error:
        return None, [f"{shown}: cannot be read: {error.strerror}"]
    if root is None or (isinstance(root, ScalarNode) and root.value == ""):
        return [], []
    if not isinstance(root, MappingNode):
        return None, [f"{shown}:{_line(root)}: a recipe must be a mapping of key: value"]
    problems = [f"{shown}:{problem}" for problem in _refused(root, "the file")]
    return [] if problems else list(_settings(root, "", shown, problems)), problems


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _settings(node: MappingNode, prefix: str, shown: str, problems: list[str]) -> Iterator[Setting]:
    """Walk a mapping into dotted keys, down to where the schema expects a value."""
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        origin = f"{shown}:{_line(key_node)}"
        if not isinstance(key_node, ScalarNode):
            problems.append(f"{origin}: {prefix}?: a key must be a plain word")
            continue
        key = prefix + key_node.value
        if key in lines:
            given = f" = {value.value}" if isinstance(value, ScalarNode) else ""
            first = f"first set in line {lines[key]}"
            problems.append(f"{origin}: {key}{given}: duplicate key, {first}; keep one")
        elif "." in key_node.value:
            nest = "put {1} under {0}:".format(*key_node.value.split(".", 1))
            problems.append(f"{origin}: {key}: a key in a file holds no dot; {nest}")
        elif refused := [*_refused(key_node, key), *_refused(value, key)]:
            problems += [f"{shown}:{problem}" for problem in refused]
        elif isinstance(value, MappingNode) and pattern(key) in (*SECTIONS, *MAPPINGS):
            yield from _settings(value, f"{key}.", shown, problems)
        else:
            items = value.value if isinstance(value, SequenceNode) else ()
            places = tuple(f"{shown}:{_line(item)}" for item in items)
            yield Setting(key, _raw(value), origin, places)
        lines.setdefault(key, _line(key_node))


def _refused(node: Node, key: str) -> Iterator[str]:
    """Anchors (so that no alias exists) and tags other than YAML's plain types."""
    if node.anchor:
        yield (
            f"{_line(node)}: {key}: anchors and aliases are not taken; include a fragment instead"
        )
    elif str(node.tag).removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        yield f"{_line(node)}: {key}: the tag {str(node.tag)!r} is not taken; write a plain value"
    elif isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _refused(item, f"{key}[{index}]")


def _raw(node: Node) -> Raw:
    if isinstance(node, SequenceNode):
        return [_raw(item) for item in node.value]
    if isinstance(node, MappingNode):
        return {}
    return None if str(node.tag).endswith(":null") else str(node.value)
