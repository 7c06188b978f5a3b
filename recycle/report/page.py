"""The report as one HTML page: the Markdown of `document.py`, with its plots drawn into it.

It fetches nothing and runs nothing, so it works when mailed and in ten years.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recycle.results import Results

from .document import render_making, render_opening
from .drawing import svg
from .groups import gather, render_groups, state_seeds
from .markdown import one_line
from .plots import plots_of
from .publication import hide_folders

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_page(runs: Sequence[Results]) -> str:
    """One page of one run or more. Needs jinja2, markdown-it-py and matplotlib (extra `train`)."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    several = len(runs) > 1
    name = f"{len(runs)} runs" if several else one_line(runs[0].name)
    parts: list[dict[str, Any]] = []
    for group in gather(runs):
        for run in map(hide_folders, group.runs):
            prefix = f"r{len(parts)}"
            parts.append(
                {
                    "title": f"{group.label}: {one_line(run.name)}, seeds {state_seeds(run)}, "
                    f"{run.date:%Y-%m-%d %H:%M} UTC",
                    "opening": _html(render_opening(run), run, prefix, several),
                    "samples": run.samples,
                    "making": _html(render_making(run), run, f"{prefix}m", several),
                }
            )
    groups = _html(render_groups(runs), runs[0], "g", False) if several else ""
    return template.render(name=name, several=several, groups=groups, runs=parts)


def _html(markdown: str, run: Results, prefix: str, deeper: bool) -> str:
    """Markdown of ours as HTML: plots inline, tables in boxes that scroll.

    Args:
        markdown: Its images are names of plots.
        run: What the plots are drawn from.
        prefix: Of the ids in them.
        deeper: Headings are one level down.
    """
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml
    from markupsafe import Markup

    plots = plots_of(run)

    def image(self: Any, tokens: Any, at: int, options: Any, env: Any) -> str:
        name, said = tokens[at].attrs["src"], escapeHtml(tokens[at].content)
        drawing = svg(plots[name](run), f"{prefix}-{name.partition('.')[0]}")
        return (
            f'<span class="plot" role="img" aria-label="{said}">{drawing}</span>'
            f'<span class="caption">{said}</span>'
        )

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for token in tokens:
        if deeper and token.type.startswith("heading"):
            token.tag = f"h{int(token.tag[1:]) + 1}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))
