"""A document as a source gives it, and the error of this room."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from recycle.errors import RecycleError

if TYPE_CHECKING:
    from .chat import Conversation

IGNORED = -100  # label of a token that nothing is learned from
TRIVIAL_LINE = 12  # characters; a shorter line (`else:`, `return x`) says nothing about copying
# Tabs, newlines, form feeds, backspaces and the escapes of terminals are text.
_CONTROL = re.compile(r"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")


class DataError(RecycleError):
    """The data cannot serve the recipe; the message says why and what to change."""


@dataclass(frozen=True)
class Text:
    """One document; those of one group are never in two splits."""

    group: str
    name: str
    text: str  # of a conversation, what is compared with others
    conversation: "Conversation | None" = None
    answer: str | None = None  # the right one, where that is known

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

    @property
    def is_binary(self) -> bool:
        """Whether it is no text, though it decodes: NUL bytes, or over 1 % control characters."""
        return "\0" in self.text or len(_CONTROL.findall(self.text)) > len(self.text) / 100

    def normalised(self) -> str:
        """The text but for newlines, indentation, and empty lines at both ends."""
        return "\n".join(line.strip() for line in self.text.splitlines()).strip()

    @cached_property
    def digest(self) -> str:
        """Of what `normalised` leaves; equal for copies."""
        return sha256(self.normalised())

    def fingerprint(self) -> str:
        chat = self.conversation
        content = self.text
        if chat is not None:
            content = json.dumps((chat.messages, chat.tools, chat.learned), default=str)
        return f"{self.name} {sha256(content)}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def besides(skipped: Counter[str]) -> str:
    """What was left out, in the words of an error message."""
    counts = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    return f" (left out before: {counts})" if counts else ""
