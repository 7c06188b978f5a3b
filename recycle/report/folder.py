"""The files of a report, in the run folder."""

from pathlib import Path

from recycle.disk import write_atomically
from recycle.results import Results

from .card import render_card
from .document import render_report
from .plots import plot_loss_vs_streams, plot_loss_vs_tokens


def write_report(results: Results, folder: Path) -> None:
    """Write report.md, README.md (the model card), loss_vs_tokens.png and loss_vs_streams.png.

    Everything is made before anything is written, and each file is replaced as a whole.
    Needs matplotlib (extra `train`).
    """
    contents = {
        "loss_vs_tokens.png": plot_loss_vs_tokens(results),
        "loss_vs_streams.png": plot_loss_vs_streams(results),
        "report.md": render_report(results).encode(),
        "README.md": render_card(results).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
