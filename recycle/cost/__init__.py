"""What a run will take, told before it starts."""

from .estimate import PassCost, pass_cost
