"""What a run and a family take, told before.

Reading order: `gpu.py` and `gpus.yaml` (what a GPU can do), `shape.py` (what counts of a model),
`inference.py` (memory and latency for each P), `training.py` (operations, time and memory),
`scaling.py` (a larger model that is as good), `forecast.py` and `table.py` (what `recycle plan`
prints); `passes.py` (the same measured on the model itself), `pricing.py` (from a token's cost to a
run's).
"""

from .gpu import CostError, Gpu, find_gpu
from .pricing import PassCost, Work, total
