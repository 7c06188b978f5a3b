"""A report, a model card and two plots. They are made from `Results` alone, always the same.

Reading order: `document.py` (the files, the report), `card.py` (the model card), `result.py` (what
both say of the result), `streams.py`, `plots.py`, `publication.py` (what stays private),
`markdown.py`.
"""

from .card import render_card
from .document import render_report, write_report
from .plots import plot_loss_vs_streams, plot_loss_vs_tokens
from .result import explain_table, list_warnings, state_findings
