"""How a problem with a recipe is said: the rule, what is valid, and what was probably meant."""

import difflib
import glob
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic_core import ErrorDetails

from recycle.disk import expand
from recycle.errors import RecycleError

from . import files
from .fields import FIELDS, SECTIONS, pattern

# Section -> folder of the fragments that fill it.
FRAGMENTS = {"backbone": "models", "data": "data", "training": "training"} | {
    section: "data" for section in SECTIONS if section.endswith((".data", ".mix.*"))
}
# What the folder of a thing holds, where it is not on the Hub.
HOLDS: dict[str, dict[str, str]] = {
    "model": {"model": "config.json"},
    "adapter": {"LoRA": "adapter_config.json"},
    "family": {},
}
TEXT_FILE = re.compile(r"\.(jsonl?|txt|md|gz)$")


class RecipeError(RecycleError):
    """A recipe that cannot be used; the message lists all that is wrong, `problems` one by one."""

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n  ".join([f"{subject}: {count}", *problems]))


def reword(error: ErrorDetails) -> tuple[str, str]:
    """Pydantic's sentence in the words of the other messages, and a guess at what was meant."""
    if error["type"] == "literal_error":
        expected = re.split(", | or ", error["ctx"]["expected"])
        words = ["null" if word == "None" else word.strip("'") for word in expected]
        close = nearest(str(error["input"]), words)
        return f"must be one of {', '.join(words)}", f"did you mean {close}?" if close else ""
    message = re.sub(r"^(Input|String|Tuple|Value) should", "must", error["msg"])
    message = re.sub(r" after validation, not \d+$", "", message)
    for name, word in (("string", "text"), ("tuple", "list, such as 2,4,8 or [2, 4, 8]")):
        message = message.replace(f"must be a valid {name}", f"must be a {word}")
    return message, ""


def shorten(value: object) -> str:
    """A value in at most 60 characters."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(shorten(item) for item in value)}]"
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = "{...}" if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def choices_hint(word: str, choices: Sequence[str]) -> str:
    """What may stand instead of `word`, the nearest first."""
    close = nearest(word, choices)
    return f"{f'did you mean {close}? ' if close else ''}valid: {', '.join(choices)}"


def section_hint(section: str) -> str:
    """What to write for a section."""
    keys = (key for key in (*FIELDS, *SECTIONS) if "*" not in key)
    inside = [key for key in keys if key.rpartition(".")[0] == pattern(section)]
    return f"set {', '.join(inside)}{fragment_hint(section)}"


def fragment_hint(section: str) -> str:
    """The fragments that fill a section on their own, where there are any."""
    folder = FRAGMENTS.get(pattern(section))
    if folder is None:
        return ""
    if "." in section:
        return f"; or name a fragment, {section}: {' | '.join(files.shipped(folder))}"
    whole = [name for name in files.shipped(folder) if files.is_whole(folder, name, section)]
    names = ", ".join(f"{folder}/{name}" for name in whole)
    return f"; or include one of {names} (on the command line {section}=NAME)"


def path_hint(section: str, value: files.Raw, in_file: bool) -> str:
    """What to write where a path, a Hub id or a number stands for a section; else nothing."""
    if pattern(section) not in FRAGMENTS or not isinstance(value, str) or not value:
        return ""
    is_path = "/" in value or TEXT_FILE.search(value) or value.endswith(".gguf")
    is_path = is_path or glob.has_magic(value) or os.path.lexists(expand(value))
    if section == "training" and re.fullmatch(r"[0-9][0-9._]*[kKMB]?", value):
        about, fields, override = "a number of tokens", f"tokens: {value}", f".tokens={value}"
    elif not is_path:
        return ""
    elif section == "training" or value.endswith((".yaml", ".yml")):
        return "a fragment of your own is included in a recipe file (include: [PATH])"
    elif section == "backbone":
        about, fields, override = "a model folder or Hub id", f"id: {value}", f".id={value}"
    else:
        source = "jsonl" if re.search(r"\.jsonl?(\.gz)?$", value) else "files"
        about, fields = "text of your own", f"source: {source}, path: {value}"
        override = f"={source} data.path={value}"
    return f"for {about} write {section}{f': {{{fields}}}' if in_file else override}"


def path_problem(kind: str, value: str) -> str:
    """What the disk shows to be wrong with a path; `kind` is a data source, or one of `HOLDS`."""
    path = expand(value)
    is_folder = os.path.isdir(path)
    if kind == "hub" and os.path.exists(value):  # load_dataset would read it in place of the Hub's
        return (
            "hub takes the id of a data set on the Hub, and this is here on disk; "
            "set data.source=files or data.source=jsonl, or run in another folder"
        )
    if kind in ("jsonl", "parquet") and is_folder:
        inside = f"data.path='{value.rstrip('/')}/*.{kind}'"
        return f"{kind} reads a file or a glob; the files of this folder are {inside}"
    for what, file in HOLDS.get(kind, {}).items():
        if is_folder and not os.path.isfile(path / file):
            return f"the folder holds no {file}, so it is no {what}"
    # On the Hub a model is `name` or `owner/name`, and one inside a package has a :// in it.
    local = value.startswith((".", "~", os.sep)) or (value.count("/") > 1 and "://" not in value)
    elsewhere = not local if kind in HOLDS else kind not in ("files", "jsonl", "parquet")
    matches = glob.iglob(str(path), recursive=True) if glob.has_magic(value) else ()
    there = elsewhere or os.path.exists(path) or any(matches)
    return "" if there else f"there is no such file or folder (looked from {Path.cwd()})"


def package_problem(tracker: str) -> str:
    """What to install for a value of `logging.to`, where its package is not there."""
    found = tracker != "none" and importlib.util.find_spec(tracker)
    if tracker == "none" or (found and found.origin):  # a mere folder `wandb` has no origin
        return ""
    name = tracker if tracker == "wandb" else f"'recycle-lm[{tracker}]'"
    return f"{tracker}: this needs {tracker}: pip install {name}"


def key_hint(key: str) -> str:
    """The nearest valid key and the keys that are valid at its place."""
    parent, _, last = pattern(key).rpartition(".")
    known = [*FIELDS, *SECTIONS]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last and "*" not in name]
    if elsewhere:  # the plain section before a stage's own
        guess = " or ".join([x for x in elsewhere if "stages." not in x] or elsewhere)
    elif siblings:
        close = nearest(last, [name.rpartition(".")[2] for name in siblings])
        guess = f"{parent}.{close}".lstrip(".") if close else ""
    else:
        guess = nearest(key, known) or ""
    top = [name for name in known if "." not in name]
    valid = ", ".join(name.rpartition(".")[2] for name in siblings or top)
    place = f"in {parent}" if siblings and parent else "at the top"
    return f"{f'did you mean {guess}? ' if guess else ''}valid {place}: {valid}"
