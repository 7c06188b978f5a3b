"""What a run will take, told before it starts."""

from .estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]
