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


def narrowed(passes: Sequence[Pass], p: Sequence[int] | None) -> list[Pass]:
    """The passes with no more than some values of P, and what these are compared with.

    Args:
        passes: Of a family.
        p: Values of P; None keeps all. The backbone, P = 1 and the control stay.
    """
    kept = []
    for active, names in passes:
        served = [] if active is None else [x for x in active.p_values if p is None or x in (1, *p)]
        if active is None:
            kept.append(Pass(None, names))
        elif served:
            names = [x for x, n in zip(names, active.p_values, strict=True) if n in served]
            kept.append(Pass(ActiveStreams(active.adapter, served[-1], tuple(served)), names))
    return kept


def rows_of(passes: Sequence[Pass]) -> dict[str, ActiveStreams | None]:
    """The streams of each row alone, by its name."""
    rows: dict[str, ActiveStreams | None] = {}
    for active, names in passes:
        for name, p in zip(names, active.p_values if active else [1], strict=True):
            rows[name] = active and ActiveStreams(active.adapter, p, (p,))
    return rows
