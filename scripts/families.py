"""Examine every causal-LM type of the installed transformers, and record which can have streams.

    python scripts/families.py               # all of them: writes families.json and families.md
    python scripts/families.py llama jamba   # these: prints what each check found, writes nothing
    python scripts/families.py --check       # examines nothing; exit 1 if the record is stale

A type is supported, refused or broken in transformers itself. The command fails, and records
nothing, where one is neither or has lost its support; to accept a loss, remove the record first.
"""

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from tests.families.configs import MODEL_TYPES  # noqa: E402
from tests.families.verdict import (  # noqa: E402
    BROKEN,
    FAILED,
    PASSED,
    REFUSED,
    SUPPORTED,
    Verdict,
    examine,
)

RECORD = ROOT / "scripts" / "measured" / "families.json"
TABLE = RECORD.with_suffix(".md")
# What decides a verdict, besides the libraries.
PATTERNS = ("recycle/parscale/*.py", "recycle/family/switch.py", "tests/families/*.py")
WORKERS = 2


def sources(root: Path = ROOT) -> list[Path]:
    """The files that decide a verdict."""
    return sorted(path for pattern in PATTERNS for path in root.glob(pattern))


def sources_sha256(root: Path = ROOT) -> str:
    """Of the code in these files, without comments and docstrings."""
    code = (f"{path.relative_to(root)}\n{_code(path)}" for path in sources(root))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        node.body = [  # type: ignore[attr-defined]
            line
            for line in body
            if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        ]
    return ast.dump(tree)


def versions() -> dict[str, str]:
    """Of the libraries that decide a verdict, without what build of them it is."""
    return {x.__name__: x.__version__.partition("+")[0] for x in (torch, transformers, peft)}


def _quiet() -> None:
    torch.set_num_threads(1)  # tiny models gain nothing from more
    transformers.utils.logging.set_verbosity_error()


def examined(model_types: list[str]) -> dict[str, Verdict]:
    """The verdict of each type, from processes of their own."""
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), _quiet) as pool:
        verdicts = {}
        for model_type, verdict in zip(model_types, pool.map(examine, model_types), strict=True):
            print(f"{model_type:28} {verdict.state}", flush=True)
            verdicts[model_type] = verdict
    return verdicts


def record(verdicts: dict[str, Verdict], seconds: float) -> dict[str, Any]:
    """What is kept."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", *PATTERNS], text=True)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit + (" and changes" if changed else ""),
        "command": "python scripts/families.py",
        "seconds": round(seconds),
        "versions": versions(),
        "sources_sha256": sources_sha256(),
        "types": {name: asdict(verdict) for name, verdict in verdicts.items()},
    }


def table(kept: dict[str, Any]) -> str:
    """The record as Markdown."""
    of = kept["versions"]
    types: dict[str, dict[str, Any]] = kept["types"]
    counts = Counter(verdict["state"] for verdict in types.values())
    lines = [
        "# Which models can have streams",
        "",
        f"Every causal-LM type of transformers {of['transformers']}, a tiny random model of "
        f"each, in float32 on the CPU: {counts[SUPPORTED]} supported, {counts[REFUSED]} refused, "
        f"{counts[BROKEN]} broken in transformers itself. Made by `{kept['command']}` in "
        f"{kept['seconds']} s, {kept['date']}, commit {kept['commit']}, torch {of['torch']}, "
        f"peft {of['peft']}.",
        "",
        f"## Supported ({counts[SUPPORTED]})",
        "",
        "With two streams: P = 1 is the backbone bit for bit; every prefix and aggregator gets a "
        "gradient; cached logits and tokens equal uncached; left padding, beam search and a static "
        "cache change nothing, nor does sdpa in place of eager attention; a saved adapter loads to "
        "the same logits. Logits are equal within 1e-4 of the largest of them. The last columns "
        "say whether a cache takes several tokens at once, as in a second turn; whether sequences "
        "in one row are told apart by their positions (with `use_cache=False`); and whether one "
        "stream that starts from a text is the backbone conditioned on that text, or else what "
        "hinders that: it starts from the text's values all the same.",
        "",
        "| type | attention | warm cache | packing | text start |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, verdict in types.items():
        if verdict["state"] == SUPPORTED:
            checks = verdict["checks"]
            words = (
                "eager, sdpa" if checks["attention"] == PASSED else checks["attention"],
                *("yes" if checks[x] == PASSED else checks[x] for x in ("warm cache", "packing")),
                "equal" if checks["text start"] == PASSED else checks["text start"],
            )
            lines.append(f"| {name} | {' | '.join(words)} |")
    titles = {REFUSED: "Refused", BROKEN: "Broken in transformers itself, or not to be run alone"}
    for state, title in titles.items():
        lines += ["", f"## {title} ({counts[state]})", ""]
        if state == BROKEN:
            lines += [
                "The check that the bare backbone fails, and how; or why it cannot be run here or "
                "by itself. Streams are not refused on these, and not examined.",
                "",
            ]
        lines += ["| type | reason |", "| --- | --- |"]
        for name, verdict in types.items():
            if verdict["state"] == state:
                reason = verdict["reason"].replace("|", "\\|").split(". Supported are")[0]
                lines.append(f"| {name} | {reason} |")
    return "\n".join(lines) + "\n"


def stale() -> str:
    """Why the record is stale; empty if it is not."""
    if not RECORD.is_file():
        return "there is none"
    kept = json.loads(RECORD.read_text())
    for name, version in versions().items():
        if kept["versions"][name] != version:
            return f"it is of {name} {kept['versions'][name]}, and here is {version}"
    if set(kept["types"]) != set(MODEL_TYPES):
        return f"it lacks {sorted(set(MODEL_TYPES) ^ set(kept['types']))}"
    if kept["sources_sha256"] != sources_sha256():
        return "the method or its checks have changed since"
    if not TABLE.is_file() or TABLE.read_text() != table(kept):
        return f"{TABLE.name} is not made from it"
    return ""


def _has_lost(before: dict[str, Any] | None, now: Verdict) -> bool:
    """Whether a type was supported, or passed a check, and no longer is or does."""
    if before is None or before["state"] != SUPPORTED:
        return False
    passed = [name for name, outcome in before["checks"].items() if outcome == PASSED]
    return now.state != SUPPORTED or any(now.checks.get(name) != PASSED for name in passed)


def main() -> None:
    """Examine and record, or check the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types, all by default")
    parser.add_argument("--check", action="store_true", help="exit 1 if the record is stale")
    arguments = parser.parse_args()
    if arguments.check:
        reason = stale()
        if reason:
            sys.exit(f"The record of model types is stale: {reason}. Run make test-all")
        return
    unknown = sorted(set(arguments.types) - set(MODEL_TYPES))
    if unknown:
        sys.exit(f"No causal-LM types of this transformers: {', '.join(unknown)}")
    started = time.monotonic()
    verdicts = examined(arguments.types or list(MODEL_TYPES))
    if arguments.types:
        print(json.dumps({name: asdict(x) for name, x in verdicts.items()}, indent=2))
    before = json.loads(RECORD.read_text())["types"] if RECORD.is_file() else {}
    lost = [
        name
        for name, verdict in verdicts.items()
        if verdict.state == FAILED or _has_lost(before.get(name), verdict)
    ]
    if lost:
        reasons = (f"{name}: {verdicts[name].state}, {verdicts[name].reason}" for name in lost)
        sys.exit("Without support, and recorded nothing:\n" + "\n".join(reasons))
    if not arguments.types:
        kept = record(verdicts, time.monotonic() - started)
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
        TABLE.write_text(table(kept))
        print(f"{len(verdicts)} types in {kept['seconds']} s: {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
