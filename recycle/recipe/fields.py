"""Every key that a recipe may hold, dotted, with what is known of it; and a recipe as such keys."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from .schema import Recipe, Section, Source

# Which sources, and which formats of rows, a field of a data section belongs to; fields that are
# not here belong to all.
_ROWS = ("hub", "jsonl", "parquet")
SOURCES = {
    "path": ("hub", "files", "jsonl", "parquet"),
    "subset": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "format": _ROWS,
    "text_field": _ROWS,
    "messages_field": _ROWS,
    "group_field": _ROWS,
    "packages": ("stdlib",),
    "conversations": ("tasks",),
    "mix": ("mix",),
    "test_path": ("files", "jsonl", "parquet"),
}
FORMATS = {"text_field": "text", "messages_field": "chat"}


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, perhaps beside None."""
    kinds_of = get_args(annotation) or (annotation,)
    found = [x for x in kinds_of if isinstance(x, type) and issubclass(x, Section)]
    return found[0] if found and get_origin(annotation) is not dict else None


def _fields(model: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        key = prefix + name
        if section := _section(info.annotation):
            if section is not info.annotation:
                OPTIONAL.append(key)
            yield from _fields(section, f"{key}.")
            continue
        yield key, info
        if get_origin(info.annotation) is dict:
            MAPPINGS.append(key)
            entry = get_args(info.annotation)[1]
            if section := _section(entry):
                yield from _fields(section, f"{key}.*.")
            else:
                yield f"{key}.*", FieldInfo.from_annotation(entry)


OPTIONAL: list[str] = []  # sections that need not be there
MAPPINGS: list[str] = []  # fields that hold one value, or one section, for each of their own keys
# Every field that holds a value, by dotted key; `*` stands for the keys of a mapping.
FIELDS = dict(_fields(Recipe))
# Keys that hold other keys, from the outermost on.
SECTIONS = [
    section
    for section in dict.fromkeys(
        key.rsplit(".", cut)[0] for key in FIELDS for cut in range(key.count("."), 0, -1)
    )
    if section not in FIELDS
]


def pattern(key: str) -> str:
    """A key as FIELDS and SECTIONS have it: with `*` for what a mapping's own keys are."""
    for mapping in MAPPINGS:
        if key.startswith(f"{mapping}."):
            _, dot, rest = key.removeprefix(f"{mapping}.").partition(".")
            return f"{mapping}.*{dot}{rest}"
    return key


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by dotted key, in the order of the schema.

    Left out are fields that do not belong to their section's data source, and sections that are not
    there. A mapping gives the keys of its entries, or itself where it is empty.
    """
    return dict(_flat(recipe, ""))


def _flat(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        if isinstance(section, Source) and not belongs(name, section.source, section.format):
            continue
        if isinstance(value, Section):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, dict) and value:
            for item in sorted(value):
                if isinstance(value[item], Section):
                    yield from _flat(value[item], f"{key}.{item}.")
                else:
                    yield f"{key}.{item}", value[item]
        elif _section(info.annotation) is None:
            yield key, value


def belongs(name: str, source: str, format: str) -> bool:
    """Whether a field of a data section does anything for this source and format of rows."""
    return source in SOURCES.get(name, (source,)) and format == FORMATS.get(name, format)


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as a tree: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return tree
