"""What of a record may be published: of a local path, its last part."""

import re
from pathlib import PurePath
from typing import Any

from recycle.results import Results

# A path from the root, from home or from above: at the start of a word, or behind a quote, "=",
# a bracket, a comma or a space in it. Not the one in https://HOST/PATH.
_PATH = re.compile(
    r"""(^|.*?["'=\[{(,\s])((?:file://|~[\w.-]*|\.{1,2})?/.*?)(["'\]})]*)""", re.DOTALL
)
# A word of a command line; quoted spaces are part of it.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")

_PLACE = re.compile(r"""[^\s"'=,;]+/[^\s"'=,;]*""")


def hide_folders(results: Results) -> Results:
    """The same results with the last part only of every local path; `results.json` keeps them.

    Of the platform the system's name stays: the release of a kernel can name who built it.
    """
    backbone, parts = results.backbone, [results.data, results.adapt_data or results.data]
    local = {backbone.id} if backbone.source == "folder" else set()
    local |= {x.path for x in parts if x.path is not None and x.source not in ("hub", "stdlib")}
    include = {"backbone", "data", "adapt_data", "recipe"}
    hidden = _hide(results.model_dump(include=include), local)

    def publish(command: str) -> str:
        for path in sorted(local, key=len, reverse=True):
            command = command.replace(path, _last_part(path))
        return _WORD.sub(lambda word: _shorten(word[0]), command)

    system = results.hardware.platform.partition("-")[0]
    return results.model_copy(
        update={
            "command": publish(results.command),
            "hardware": results.hardware.model_copy(update={"platform": system}),
            "recipe": hidden["recipe"],
            "backbone": backbone.model_copy(update=hidden["backbone"]),
            "data": results.data.model_copy(update=hidden["data"]),
            "adapt_data": results.adapt_data
            and results.adapt_data.model_copy(update=hidden["adapt_data"]),
            "tasks": tuple(
                x.model_copy(
                    update={
                        "name": _hide(x.name, local),
                        "command": cut_places(publish(x.command), results),
                        "settings": _hide(x.settings, local),
                    }
                )
                for x in results.tasks
            ),
        }
    )


def cut_places(command: str, results: Results) -> str:
    """A command with the last part only of all that has a slash, but the Hub ids of the record."""
    parts = [results.data, results.adapt_data or results.data]
    known = {x.path for x in parts if x.source == "hub"}
    if results.backbone.source != "folder":
        known.add(results.backbone.id)
    return _PLACE.sub(lambda x: x[0] if x[0] in known else _last_part(x[0]), command)


def _hide(value: Any, local: set[str]) -> Any:
    if isinstance(value, dict):
        return {_hide(key, local): _hide(item, local) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item, local) for item in value]
    if isinstance(value, str):
        return _last_part(value) if value in local else _shorten(value)
    return value


def _shorten(word: str) -> str:
    found = _PATH.fullmatch(word)
    return word if found is None else f"{found[1]}{_last_part(found[2])}{found[3]}"


def _last_part(path: str) -> str:
    return PurePath(path).name or path
