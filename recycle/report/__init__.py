"""Results -> a Markdown report, two plots and the model card, from `Results` alone.

The same results give the same bytes. Reading order: `folder.py` (which files), `document.py` (the
report) and `card.py` (the model card) on `result.py` (what both say of the result), `plots.py`,
`markdown.py` (text that names cannot break).
"""

from .card import model_card
from .document import report
from .folder import write_report
from .plots import plot_loss_vs_streams, plot_loss_vs_tokens
from .result import explanations, findings, warnings

__all__ = [
    "explanations",
    "findings",
    "model_card",
    "plot_loss_vs_streams",
    "plot_loss_vs_tokens",
    "report",
    "warnings",
    "write_report",
]
