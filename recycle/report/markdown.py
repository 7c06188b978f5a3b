"""Markdown that the names of recipes, models and paths cannot break, whatever they hold."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONG = 16  # items; a longer list is not shown


def join_blocks(*parts: str) -> str:
    """Blocks with an empty line between them; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def one_line(value: str) -> str:
    """Text without line breaks, which would start a heading or end a cell."""
    return " ".join(value.split())


def escape(value: str) -> str:
    """Text that shows as it is, in a line or a table's cell."""
    return re.sub(r"([\\`*_\[\]<>#~!&$])", r"\\\1", one_line(value)).replace("|", "&#124;")


def code(value: str) -> str:
    """A code span, where one can hold the value in a line and in a table's cell."""
    value = one_line(value)
    return escape(value) if not value or re.search(r"[`|\\]", value) else f"`{value}`"


def fence(content: str, language: str) -> str:
    """A block of code, between more backticks than it holds."""
    longest = max(map(len, re.findall("`+", content)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{content}\n{ticks}"


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of headings and rows: the first column to the left, numbers to the right."""
    header, *lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    ruler = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    return "\n".join([header, ruler, *lines])


def facts(known: Mapping[str, Any]) -> str:
    """A list of names and values; those that are None are left out."""
    return bullets(
        f"{escape(name.replace('_', ' '))}: {_value(value)}"
        for name, value in known.items()
        if value is not None
    )


def _value(value: Any) -> str:
    if isinstance(value, str):
        return code(value)
    if isinstance(value, list) and len(value) > LONG:
        return f"{len(value)}, listed in `results.json`"
    return code(json.dumps(value, ensure_ascii=False))
