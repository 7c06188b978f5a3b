"""One training: streams learn on the frozen backbone, or its weights learn alone.

Reading order: `plan.py` (what is trained, and how), `learned.py` (what learns, saved and loaded),
`training.py` (from what it starts from to its record), `trainer.py` (the loss of every P from one
pass, and what is watched), `arguments.py` (what transformers' Trainer is told), `checkpoints.py`
(going on after a kill).
"""

from .checkpoints import TrainingError, last_checkpoint
from .learned import add_lora, add_streams, free_weights
from .plan import TrainingPlan
from .trainer import StreamTrainer
from .training import steps_done, train
