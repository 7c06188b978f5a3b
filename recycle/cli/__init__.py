"""The `recycle` command. A command imports its room only when it runs, so that `--help` answers
at once.

Reading order: `app.py` (what commands share), `entry.py` (errors); the commands in the order of
`recycle --help`: `recycling.py`, `evidence.py`, `use.py`, `exchange.py`.
"""

from . import recycling, evidence, use, exchange  # isort: skip
from .entry import main
