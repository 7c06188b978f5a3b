"""One training: streams learn on the frozen backbone, or its weights learn alone.

Reading order: `plan.py` (what is trained, and how), `learned.py` (what learns, saved and loaded),
`training.py` (from what it starts from to its record), `fitting.py` (the micro-batch that fits),
`shortage.py` (what takes less memory), `trainer.py` (the loss of every P from one pass, and what is
watched), `validation.py` (the validation loss), `arguments.py` (what transformers' Trainer is
told), `checkpoints.py` (going on after a kill), `tracking.py` (numbers for trackio and the like).
For speed: `compilation.py` (compiled layers), `packing.py` (masks that wait for nothing).
"""

from .checkpoints import TrainingError, last_checkpoint
from .learned import add_lora, add_streams, free_weights
from .plan import TrainingPlan
from .trainer import StreamTrainer
from .training import steps_done, train
