"""The models that one backbone with its adapters can be: the rows of the table."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from recycle.parscale import ActiveStreams, streams_of


@dataclass(frozen=True)
class Variant:
    """One row of the table: its name, and its streams (None: the backbone)."""

    name: str
    active: ActiveStreams | None

    @property
    def num_streams(self) -> int:
        return 1 if self.active is None else self.active.num_streams


def variants_of(model: nn.Module, adapter: str | None = None) -> list[Variant]:
    """The backbone, one-stream adapters such as the control, and each P, in the table's order.

    Args:
        model: A model with ParScale adapters.
        adapter: Only the variants of this adapter.
    """
    served = streams_of(model).selection.p_values
    members = sorted((p, name) for name, p_values in served.items() for p in p_values)
    found = [Variant("backbone", None)] if adapter is None else []
    for p, name in members:
        if adapter in (None, name):
            title = name if p == 1 else f"P = {p}"
            found.append(Variant(title, ActiveStreams(name, p, (p,))))
    return found


def grouped_by_pass(variants: Sequence[Variant]) -> list[tuple[ActiveStreams | None, list[str]]]:
    """Streams and names of the variants that one pass of the decoder serves, pass by pass.

    All P of a nested adapter are one pass with the most streams.
    """
    names: dict[str | None, list[str]] = {}
    p_values: dict[str | None, list[int]] = {}
    for variant in variants:
        adapter = None if variant.active is None else variant.active.adapter
        names.setdefault(adapter, []).append(variant.name)
        p_values.setdefault(adapter, []).append(variant.num_streams)
    return [
        (None if adapter is None else ActiveStreams(adapter, p[-1], tuple(p)), names[adapter])
        for adapter, p in p_values.items()
    ]
