"""A document of text as a source gives it, and the error of this room."""

import hashlib
from collections import Counter
from dataclasses import dataclass

from recycle.errors import RecycleError

TRIVIAL_LINE = 12  # characters; a shorter line (`else:`, `return x`) says nothing about copying


class DataError(RecycleError):
    """The data cannot serve the recipe; the message says why and what to change."""


@dataclass(frozen=True)
class Text:
    """One document; those of one group are never in two splits."""

    group: str
    name: str
    text: str

    def __post_init__(self) -> None:
        # File names may be any bytes, and JSON can spell half a surrogate pair; reports cannot.
        for field in ("group", "name"):
            value: str = getattr(self, field)
            printable = value.encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, field, printable)

    def lines(self) -> set[str]:
        """The distinct lines that say something, without indentation."""
        lines = (line.strip() for line in self.text.splitlines())
        return {line for line in lines if len(line) >= TRIVIAL_LINE}

    def fingerprint(self) -> str:
        return f"{self.name} {sha256(self.text)}"


Tokenised = tuple[Text, list[int]]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def besides(skipped: Counter[str]) -> str:
    """What was left out, in the words of an error message."""
    counts = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    return f" (left out before: {counts})" if counts else ""
