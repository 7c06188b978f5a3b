"""The models that one backbone with its adapters can be: the rows of the table, pass by pass."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from recycle import results
from recycle.parscale import ActiveStreams, streams_of


class Pass(NamedTuple):
    """One pass of the decoder, which serves all P of an adapter with its most streams."""

    active: ActiveStreams | None
    """None is the backbone."""
    names: list[str]
    """Of the rows in the table, one for each P."""


def passes_of(model: nn.Module, alone: str = results.BACKBONE) -> list[Pass]:
    """The model without streams, the control, and each P, in the table's order.

    Args:
        model: A model with ParScale adapters.
        alone: What its row without streams is called.
    """
    served = streams_of(model).selection.p_values
    return [Pass(None, [alone])] + [
        Pass(ActiveStreams(name, p[-1], tuple(p)), [name if x == 1 else f"P = {x}" for x in p])
        for p, name in sorted((p_values, name) for name, p_values in served.items())
    ]


def rows_of(passes: Sequence[Pass]) -> dict[str, ActiveStreams | None]:
    """The streams of each row alone, by its name."""
    rows: dict[str, ActiveStreams | None] = {}
    for active, names in passes:
        for name, p in zip(names, active.p_values if active else [1], strict=True):
            rows[name] = active and ActiveStreams(active.adapter, p, (p,))
    return rows
