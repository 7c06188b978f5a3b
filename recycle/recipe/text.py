"""A resolved recipe as text: to read with origins, and to save so that it resolves to itself."""

import io
import json
import re

from ruamel.yaml import YAML

from .consequences import notes
from .fields import MAPPINGS, flatten, nest
from .files import MARK
from .resolution import Resolved
from .schema import Recipe

# Words that need no quotes in YAML: no signs with a meaning, and not one of YAML's own words.
_WORD = re.compile(r"(?!(?:null|true|false)$)[a-z_/][\w./+-]*", re.IGNORECASE | re.ASCII)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that resolves to an equal recipe, without what its data sources lack."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(nest(flatten(recipe)), text)
    return MARK + text.getvalue()


def show(resolved: Resolved) -> str:
    """Every key and value of a resolved recipe, one to a line, with the origin as its comment."""
    told = notes(resolved.recipe)
    lines: list[tuple[str, str]] = []  # with origins; the line that opens a section has none
    opened: list[str] = []
    for key, value in flatten(resolved.recipe).items():
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            if opened[: depth + 1] != parents[: depth + 1]:
                lines.append((f"{'  ' * depth}{parent}:", ""))
        opened = parents
        text = "{}" if key in MAPPINGS else _value(value)
        note = f"; {told[key]}" if key in told else ""
        lines.append((f"{'  ' * len(parents)}{last}: {text}", resolved.origins[key] + note))
    width = max(len(line) for line, origin in lines if origin)
    return "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in lines)


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
