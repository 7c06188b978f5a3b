"""Text from a source -> splits that share nothing -> blocks of tokens.

Reading order: `splits.py` (the rule, and what comes out), `evaluation.py` and `training.py` (what
each split takes), `files.py` and `rows.py` (the sources), `text.py` (one document).
"""

from .files import STDLIB
from .splits import IGNORED, Document, Splits, prepare
from .text import DataError
