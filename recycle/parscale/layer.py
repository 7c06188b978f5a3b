"""What every kind of stream layer has in common, and what is known of its parameters.

A layer is a child of one of the backbone's modules and holds there the parameters of every adapter.
A new kind of transformation beside the prefix is a subclass in a file of its own, and one import in
`__init__.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .active import Selection
from .config import ParScaleConfig
from .errors import ParScaleError


class StreamLayer(BaseTunerLayer):
    """A child of one of the backbone's modules, as PEFT sees it.

    PEFT sets on every layer which adapter is active and whether adapters are disabled. Here all
    layers of a model answer out of the one `Selection` that they share.
    """

    child_name: ClassVar[str]
    """Name of the layer in its parent module."""
    group: ClassVar[str]
    """Its parameters' learning rate in a recipe: "prefix" or "aggregator"."""

    active_adapters: list[str]  # a property of PEFT's class
    device: torch.device  # of the backbone's module, where an adapter is added

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.merged_adapters: list[str] = []

    @property
    def _disable_adapters(self) -> bool:
        return self.selection.disabled

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self.selection.disabled = disabled

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.selection.adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self.selection.adapters = names

    @staticmethod
    def enters(config: ParScaleConfig, module: str) -> bool:
        """Whether an adapter has such a layer in the module of the model that is named so."""
        raise NotImplementedError

    def add(self, adapter: str, config: ParScaleConfig, name: str, device: torch.device) -> None:
        """Add an adapter's parameters, in float32.

        Args:
            adapter: Its name.
            config: Its configuration.
            name: Name of the parent module in the model.
            device: Where the backbone's module lies.
        """
        raise NotImplementedError

    @staticmethod
    def cut(leaf: str, tensor: Tensor, p: int) -> Tensor | None:
        """What the first `p` streams keep of a parameter; None if it belongs to another P.

        Args:
            leaf: The last part of its name.
            tensor: Its values.
            p: Streams that are kept.
        """
        raise NotImplementedError

    def remove(self) -> None:
        """Leave the parent module as it was."""

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active:
            self.selection.replaced = adapter_name
        elif self.selection.replaced == adapter_name:  # the first layer has chosen for all
            self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT calls it after a load with low_cpu_mem_usage; a child has no base layer to ask.
        assert isinstance(self, nn.Module)
        for name, parameter in self.named_parameters():
            if adapter_name in name.split(".") and parameter.device.type != "meta":
                parameter.data = parameter.data.to(device or self.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise cannot_merge()


def kinds() -> list[type[StreamLayer]]:
    """Every kind of stream layer."""
    return StreamLayer.__subclasses__()


def cannot_merge() -> ParScaleError:
    return ParScaleError(
        "Streams run beside each other and cannot be merged into the backbone's weights. Use "
        "`unload()` to get the backbone back."
    )


@dataclass(frozen=True)
class AdapterParameter:
    """One parameter of an adapter."""

    name: str
    """In the model."""
    parameter: nn.Parameter
    group: str
    """Its learning rate in a recipe: "prefix" or "aggregator"."""


def adapter_parameters(model: nn.Module, adapter: str) -> list[AdapterParameter]:
    """Every parameter of an adapter on a model."""
    return [
        AdapterParameter(f"{path}.{name}", parameter, layer.group)
        for path, layer in model.named_modules()
        if isinstance(layer, StreamLayer)
        for name, parameter in layer.named_parameters()
        if adapter in name.split(".")
    ]


def cut_state(state: Mapping[str, Tensor], p: int) -> dict[str, Tensor]:
    """The tensors of an adapter's first `p` streams, as a plain adapter with P = `p` holds them.

    Args:
        state: The adapter's tensors under PEFT's names.
        p: One of the P that the adapter serves.
    """
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        kind = next(k for k in kinds() if not set(parts).isdisjoint(k.adapter_layer_names))
        kept = kind.cut(parts[-1], tensor, p)
        if kept is not None:
            found[name] = kept
    return found


def nest_states(states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `cut_state`: one adapter that serves every P of these."""
    nested: dict[str, Tensor] = {}
    for p in sorted(states, reverse=True):  # the largest has all streams
        nested |= {name: tensor for name, tensor in states[p].items() if name not in nested}
    return nested
