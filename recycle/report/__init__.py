"""The report of one run or more as HTML and Markdown, a model card and plots.

They are made from `Results` alone, always the same. Reading order: `document.py` (the report and
its files), `page.py` (the same as HTML), `card.py` (the model card); the sections: `result.py`,
`deployment.py` (which P), `later.py` (tasks and samples), `scaling.py` (the law), `streams.py`,
`groups.py` (several runs); `plots.py` and `drawing.py`; `publication.py` (what stays private),
`markdown.py`; `request.py` (what `recycle report` asks for).
"""

from .card import render_card
from .deployment import recommend
from .document import render_report, write_report
from .page import render_page
from .plots import plot_loss_vs_streams, plot_loss_vs_tokens
from .request import ReportError, read_runs, write_reports
from .result import explain_table, list_warnings, state_findings
