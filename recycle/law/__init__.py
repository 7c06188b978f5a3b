"""The scaling law over parameters and streams: fitted, with intervals, and what it forecasts.

Reading order: `law.py` (the law, and the paper's parameters), `points.py` (what it is fitted to),
`fit.py` (the fit, which needs scipy), `run.py` (through the few points of one run).
"""

from .law import PAPER, Law, Point
from .run import RunLaw, fit_run
