"""Text from a source -> splits that share nothing -> rows of tokens.

Reading order: `splits.py` (the rule, and what comes out), `reading.py` (how documents reach the
splits), `evaluation.py` and `training.py` (what each split takes), `packing.py` (training rows),
`mix.py`, `files.py` and `rows.py` (the sources), `text.py`, `chat.py` and `encoding.py` (one
document), `tasks.py` (tasks with checkable answers), `advice.py` (where data are too few),
`prepared.py` (rows on disk), `held_out.py` (other text that a finished run is measured on).
"""

from .evaluation import Document
from .files import STDLIB
from .prepared import keep
from .splits import Splits, prepare
from .text import IGNORED, DataError
from .training import StageData
