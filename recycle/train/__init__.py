"""One training: an adapter learns on the frozen backbone.

Reading order: `plan.py` (what is trained, and how), `start.py` (the adapter that it starts from),
`trainer.py` (the loss of every P from one pass, and what is watched), `checkpoints.py` (going on
after a kill), `training.py` (all of it, to its record).
"""

from .checkpoints import TrainingError, last_checkpoint
from .plan import TrainingPlan
from .start import add_adapter
from .trainer import StreamTrainer
from .training import steps_done, train
