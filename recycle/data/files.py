"""Files as sources: a folder or glob of text, and the standard library's own source."""

import glob
import os
import platform
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from recycle.disk import expand
from recycle.recipe import Data, holds_run

from .evaluation import DOCUMENTS_PER_GROUP
from .text import DataError, Text, besides

# In Python 3.11 to 3.13 on every machine; no tests, no tables, nothing that an installation writes.
_STDLIB = """
_collections_abc _compat_pickle _markupbase _osx_support _py_abc _pydecimal _pyio _sitebuiltins
_strptime _threading_local _weakrefset abc argparse ast asyncio base64 bdb bisect bz2 cProfile
calendar cmd code codecs codeop collections colorsys compileall concurrent configparser contextlib
copy copyreg csv ctypes curses dataclasses datetime dbm decimal difflib dis doctest email enum
filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob
graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword
linecache locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers
opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib
posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib
rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig
tabnanny tarfile tempfile textwrap threading timeit token tokenize tomllib trace traceback
tracemalloc tty turtle types typing unittest urllib uuid venv warnings wave weakref webbrowser
wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""
STDLIB = tuple(_STDLIB.split())


def read_stdlib(data: Data, facts: dict[str, Any], skipped: Counter[str]) -> Iterator[Text]:
    """The .py files of the running Python's library; the group is the top-level package."""
    packages = STDLIB if data.packages is None else data.packages
    if unknown := sorted(set(packages) - set(STDLIB)):
        raise DataError(
            f"data.packages names parts of the standard library. Unknown: {', '.join(unknown)}. "
            f"Valid: {', '.join(STDLIB)}."
        )
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {}
    for package in sorted(packages):
        # A module in one version of Python is a package in another (pathlib, zipfile).
        single = root / f"{package}.py"
        pattern = root / package / "**" / "*.py"
        inside = _matches(root, pattern, {"test", "tests", "__pycache__"}, Counter())
        found[package] = [single] if single.is_file() else inside
    facts["python"] = platform.python_version()
    facts["packages"] = [package for package, files in found.items() if files]
    facts["packages_missing"] = [package for package, files in found.items() if not files]
    yield from _read(_evaluation_first(found, data), root, skipped)


def read_files(
    data: Data, facts: dict[str, Any], skipped: Counter[str], in_order: bool = False
) -> Iterator[Text]:
    """Text files; the group is the first folder in which they part, or the file itself."""
    root, files = matching(data, skipped)
    facts |= {"path": data.path, "files": len(files)}
    groups: dict[str, list[Path]] = {}
    if len(files) > 1:  # src/package/...: what all of them share is no group
        root = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        groups.setdefault(file.relative_to(root).parts[0], []).append(file)
    if in_order:
        pairs = [(group, file) for group, members in groups.items() for file in members]
    else:
        pairs = _evaluation_first(groups, data)
    yield from _read(pairs, root, skipped)


def _read(pairs: list[tuple[str, Path]], root: Path, skipped: Counter[str]) -> Iterator[Text]:
    for group, file in pairs:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1  # folders of text often hold an image or an archive
        except OSError as error:
            raise DataError(
                f"Cannot read {file}: {error.strerror}. Repair it, or leave it out of data.path."
            ) from None
        else:
            yield Text(group, file.relative_to(root).as_posix(), text)


def _evaluation_first(groups: dict[str, list[Path]], data: Data) -> list[tuple[str, Path]]:
    """Files in the order of reading: a few of each of some groups for evaluation, then all others.

    A group that evaluation takes is lost to training, and a plain shuffle would show a file of the
    largest groups first. So small groups come first, in an order random to a factor of ten.
    """
    rng = random.Random(data.seed)
    lead_size = 2 * (data.validation_documents + data.test_documents)
    lead: list[tuple[str, Path]] = []
    rest: list[tuple[str, Path]] = []
    for group in sorted(groups, key=lambda group: rng.uniform(1, 10) * len(groups[group])):
        files = [(group, file) for file in groups[group]]
        rng.shuffle(files)
        cut = DOCUMENTS_PER_GROUP if len(lead) < lead_size else 0
        lead += files[:cut]
        rest += files[cut:]
    rng.shuffle(rest)
    return lead + rest


def matching(data: Data, skipped: Counter[str]) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of data.path in sorted order.

    Links are followed. What is left out is counted in `skipped`: what is hidden, runs, what is no
    file or cannot be read, and a file that another path has brought already.
    """
    path = expand(str(data.path))
    if path.is_file():
        return path.parent, [path]
    root = pattern = path
    if path.is_dir() and data.source == "files":
        pattern = Path(glob.escape(str(path)), "**")
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    files = _matches(root, pattern, {"__pycache__"}, skipped)
    if not files:
        takes = "a folder, a file or a glob" if data.source == "files" else "a file or a glob"
        found = "holds no file" if path.is_dir() else "matches no file"
        raise DataError(
            f"data.source={data.source} reads {takes}; data.path={data.path} {found} (looked from "
            f"{Path.cwd()}{besides(skipped)}). Set `data.path` to text that is there."
        )
    return root, files


def _matches(root: Path, pattern: Path, skip: set[str], skipped: Counter[str]) -> list[Path]:
    """The files that match, each once in sorted order, under its own name rather than a link's."""
    runs = cache(holds_run)
    found: dict[Path, Path] = {}
    matches = _expanded(pattern, skip, skipped)
    for match in sorted(matches, key=lambda match: (match.is_symlink(), match)):
        reason = None
        if match.name[0] == "." != pattern.name[0]:
            reason = "hidden"
        elif any(runs(folder) for folder in match.parents if folder.is_relative_to(root)):
            reason = "in a run folder"
        elif os.path.isdir(match):
            continue
        elif not os.path.isfile(match):  # a link to nothing, a socket, no right to look
            reason = "no file"
        elif found.setdefault(match.resolve(), match) != match:
            reason = "file that was read already"
        if reason:
            skipped[reason] += 1
    return sorted(found.values())


def _expanded(pattern: Path, skip: set[str], skipped: Counter[str]) -> list[Path]:
    """What a glob matches; its `**` enters no folder twice, where Python's goes round in links."""
    if "**" not in pattern.parts:
        return [Path(match) for match in glob.glob(str(pattern), include_hidden=True)]
    at = pattern.parts.index("**")
    below = pattern.parts[at + 1 :] or ("*",)
    return [
        match
        for top in glob.glob(str(Path(*pattern.parts[:at])))
        for folder in _folders(Path(top), skip, skipped)
        for match in _expanded(Path(glob.escape(str(folder)), *below), skip, skipped)
    ]


def _folders(top: Path, skip: set[str], skipped: Counter[str]) -> Iterator[Path]:
    """Each folder under `top` once.

    Links wait until every real folder was seen: a link beside a folder must not rename its files,
    nor move them to another group.
    """

    def unreadable(error: OSError) -> None:
        skipped["unreadable folder"] += 1

    entered: set[Path] = set()
    waiting = [top]
    for start in waiting:  # grows on the way
        for parent, folders, _ in os.walk(start, onerror=unreadable):
            here = Path(parent)
            if here.resolve() in entered:
                skipped["folder that was read already"] += 1
                folders.clear()
                continue
            entered.add(here.resolve())
            yield here
            folders[:] = sorted(name for name in folders if _enter(here / name, skip, skipped))
            waiting += [here / name for name in folders if (here / name).is_symlink()]


def _enter(folder: Path, skip: set[str], skipped: Counter[str]) -> bool:
    """Whether a walk goes into this folder; counts why not."""
    reason = None
    if folder.name in skip:
        reason = f"folder named {folder.name}"
    elif folder.name[0] == ".":
        reason = "hidden"
    elif holds_run(folder):
        reason = "in a run folder"
    if reason:
        skipped[reason] += 1
    return not reason
