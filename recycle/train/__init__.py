"""One training: an adapter learns on the frozen backbone.

Reading order: `plan.py` (what is trained, and how), `training.py` (from the adapter that it starts
from to its record), `trainer.py` (the loss of every P from one pass, and what is watched),
`checkpoints.py` (going on after a kill).
"""

from .checkpoints import TrainingError, last_checkpoint
from .plan import TrainingPlan
from .trainer import StreamTrainer
from .training import add_adapter, steps_done, train
