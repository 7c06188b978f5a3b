"""What is measured of the backbone, the control and each P: losses, streams, speed, cache size.

`measure` is the way in: models and documents go in, measurements come out. Reading order:
`passes.py` (which models there are), `head.py` (log-probabilities without the logits of every
position), `losses.py`, `diversity.py` (what each stream does), `answers.py` (right answers by
greedy decoding), `samples.py`, `speed.py`, `measurement.py` (all of it together). What a finished
run can be measured on later: `exams.py`, `harness.py` and `tasks/` (lm-evaluation-harness),
`humaneval.py` on `sandbox.py` and `cage.py` (programs that a model writes).
"""

from .head import OutputHead
from .losses import document_losses
from .measurement import EvaluationError, measure, range_advice
from .passes import Pass, passes_of
