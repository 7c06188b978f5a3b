"""The scaling law over parameters and streams: fitted, with intervals, and what it forecasts."""

from .law import PAPER, Law, Point
