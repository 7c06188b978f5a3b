"""What is measured of the backbone, the control and each P: losses, streams, speed, cache size.

`measure` is the way in: models and documents go in, measurements come out. Reading order:
`passes.py` (which models there are), `head.py` (log-probabilities without the logits of every
position), `losses.py`, `diversity.py` (what each stream does), `answers.py` (right answers by
greedy decoding), `speed.py`, `measurement.py` (all of it together).
"""

from .head import OutputHead
from .losses import document_losses
from .measurement import EvaluationError, measure, range_advice
from .passes import Pass, passes_of
