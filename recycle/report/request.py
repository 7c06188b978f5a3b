"""What `recycle report RUN...` asks for: the records of the runs, and where their report goes."""

import re
from collections.abc import Sequence
from pathlib import Path

from recycle import results
from recycle.disk import expand, write_atomically
from recycle.errors import RecycleError
from recycle.results import Results

from .document import render_report, write_report
from .groups import gather, render_groups
from .markdown import join_blocks
from .page import render_page

RESULTS = "results.json"
OURS = b'<meta name="generator" content="recycle report">'


class ReportError(RecycleError):
    """A report that cannot be made or written."""


def read_runs(sources: Sequence[str]) -> list[Results]:
    """The records of finished runs.

    Args:
        sources: Run folders, or records (`results.json`, or what `recycle eval --out` wrote).

    Raises:
        ReportError: There is no such run, it is not finished, or it is named twice.
        ResultsError: Its record is damaged or of another version.
    """
    paths = []
    for source in sources:
        path = expand(source)
        if not path.exists():
            raise ReportError(f"There is no {source}. Name a run folder or its {RESULTS}.")
        if path.is_dir():
            path /= RESULTS
        if not path.is_file():
            raise ReportError(
                f"{source} is no finished run: it has no {RESULTS}. Finish it with `recycle run`."
            )
        if path.resolve() in paths:
            raise ReportError(f"{source} is named twice. Name each run once.")
        paths.append(path.resolve())
    return [results.read(path) for path in paths]


def write_reports(sources: Sequence[str], out: str | None = None) -> Path:
    """Write the report of some runs as HTML, and as Markdown beside it; returns the HTML's path.

    The report of one run folder goes into it, with its plots and its model card, unless `out` is
    given. Any other goes to `out`, or else to ./report.html; its Markdown has no plots.

    Raises:
        ReportError: As `read_runs`, or a file that is no report of ours is in the way.
        ResultsError: As `read_runs`.
    """
    runs = read_runs(sources)
    if out is None and len(sources) == 1 and (folder := expand(sources[0])).is_dir():
        write_report(runs[0], folder)
        return folder / "report.html"
    path = expand(out or "report.html")
    beside = path.with_suffix(".md")
    if path.suffix != ".html":
        raise ReportError(f"The report is HTML, so --out must end in .html, got {out}.")
    if not path.parent.is_dir():
        raise ReportError(f"{path} cannot be written: there is no folder {path.parent}.")
    if not (path.is_file() and OURS in path.read_bytes()):  # a report is written again
        for file in (path, beside):
            if file.exists():
                raise ReportError(
                    f"{file} exists already and is not overwritten. Name a new file with --out."
                )
    ordered = [run for group in gather(runs) for run in group.runs]
    texts = [re.sub(r"!\[[^\]]*\]\(\w+\.png\)\n+", "", render_report(run)) for run in ordered]
    if len(runs) > 1:
        groups = render_groups(runs)
        texts = [join_blocks(f"# Report: {len(runs)} runs", groups), *texts]
    page = render_page(runs).encode()
    write_atomically(beside, "\n".join(texts).encode())
    write_atomically(path, page)
    return path
