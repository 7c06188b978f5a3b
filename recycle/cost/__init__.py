"""What a run will take, told before it starts."""

from .estimate import Estimate, Work, estimate_run
