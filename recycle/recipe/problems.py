"""How a problem with a recipe is said: the rule, what is valid, and what was probably meant."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence

from recycle.disk import expand
from recycle.errors import RecycleError

from . import files
from .files import Nested
from .schema import FIELDS, SECTIONS

FRAGMENTS = {"backbone": "models", "data": "data", "training": "training"}  # section -> folder


class RecipeError(RecycleError):
    """A recipe that cannot be used; the message lists all that is wrong, `problems` one by one."""

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n  ".join([f"{subject}: {count}", *problems]))


def reword(message: str, words: Sequence[str]) -> str:
    """Pydantic's sentence, in the words of the other messages."""
    if words:
        return f"must be one of {', '.join(words)}"
    message = re.sub(r"^(Input|String|Tuple|Value) should", "must", message)
    message = re.sub(r" after validation, not \d+$", "", message)
    for name, word in (("string", "text"), ("tuple", "list, such as 2,4,8 or [2, 4, 8]")):
        message = message.replace(f"must be a valid {name}", f"must be a {word}")
    return message


def shorten(value: object) -> str:
    """A value in at most 60 characters."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(shorten(item) for item in value)}]"
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = "{...}" if isinstance(value, Nested) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def choices_hint(word: str, choices: Sequence[str]) -> str:
    """What may stand instead of `word`, the nearest first."""
    close = nearest(word, choices)
    return f"{f'did you mean {close}? ' if close else ''}valid: {', '.join(choices)}"


def section_hint(section: str) -> str:
    """What to write for a section."""
    keys = ", ".join(key for key in FIELDS if key.startswith(f"{section}."))
    return f"set {keys}{fragment_hint(section)}"


def fragment_hint(section: str) -> str:
    """The fragments that fill a section on their own, where there are any."""
    if section not in FRAGMENTS:
        return ""
    folder = FRAGMENTS[section]
    whole = [name for name in files.shipped(folder) if files.is_whole(folder, name, section)]
    names = ", ".join(f"{folder}/{name}" for name in whole)
    return f"; or include one of {names} (on the command line {section}=NAME)"


def path_hint(section: str, value: str) -> str:
    """What to write where a path stands for a fragment; nothing where it is none."""
    path = expand(value)
    if not path.exists() and "/" not in value and not re.search(r"\.(jsonl?|gz|txt|gguf)$", value):
        return ""
    if section == "backbone":
        return f"for a model folder or Hub id write backbone.id={value}"
    if section == "data":
        source = "jsonl" if re.search(r"\.jsonl?(\.gz)?$", value) else "files"
        return f"for text of your own write data={source} data.path={value}"
    return "a fragment of your own is included in a recipe file (include: [PATH])"


def key_hint(key: str) -> str:
    """The nearest valid key and the keys that are valid at its place."""
    parent, _, last = key.rpartition(".")
    known = [*FIELDS, *SECTIONS]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere:
        guess = " or ".join(elsewhere)
    elif siblings:
        close = nearest(last, [name.rpartition(".")[2] for name in siblings])
        guess = f"{parent}.{close}".lstrip(".") if close else ""
    else:
        guess = nearest(key, known) or ""
    top = [name for name in known if "." not in name]
    valid = ", ".join(name.rpartition(".")[2] for name in siblings or top)
    place = f"in {parent}" if siblings and parent else "at the top"
    return f"{f'did you mean {guess}? ' if guess else ''}valid {place}: {valid}"
