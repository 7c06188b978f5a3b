"""What a run will take, told before it starts."""

from .estimate import Estimate, Work, estimate_run

__all__ = ["Estimate", "Work", "estimate_run"]
