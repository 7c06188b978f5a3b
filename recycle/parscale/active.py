"""Which streams run: what a model is set to, what a thread chose, and what a forward pass is in."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .config import ParScaleConfig
from .errors import ParScaleError


@dataclass(frozen=True)
class ActiveStreams:
    """The streams of one forward pass of a decoder."""

    adapter: str
    num_streams: int
    p_values: tuple[int, ...]  # one: the P in use; several: all at once, in nested training
    apart: bool = False  # whether each stream's own final hidden states follow the merged ones
    first: int = 0  # of the adapter's streams; those before it do not run

    @property
    def rows(self) -> slice:
        """Where these streams lie among all that the adapter has."""
        return slice(self.first, self.first + self.num_streams)

    @property
    def num_outputs(self) -> int:
        """How many texts the decoder gives for each that goes in."""
        return len(self.p_values) + self.apart * self.num_streams


class Selection:
    """What a model is set to: one object that all of its stream layers share.

    So choosing P changes one place, whatever the size of the model.
    """

    def __init__(self) -> None:
        self.configs: dict[str, ParScaleConfig] = {}  # of each adapter on the model
        self.p: dict[str, int] = {}  # the P in use, for each adapter
        self.adapters: str | list[str] = []  # that are active, in PEFT's words
        self.disabled = False
        self.replaced: str | None = None  # the last adapter that was deleted while active

    def add(self, adapter: str, config: ParScaleConfig) -> None:
        """Take in an adapter; its largest P is in use first."""
        self.configs[adapter] = config
        self.p[adapter] = config.num_streams
        self.replaced = None

    def remove(self, adapter: str) -> None:
        self.configs.pop(adapter, None)
        self.p.pop(adapter, None)

    def use(self, active: ActiveStreams | None) -> None:
        """Set the model to these streams (None: the backbone)."""
        if active is not None:  # in this order, other threads see what was or what is to be
            self.p[active.adapter] = active.num_streams
            self.adapters = [active.adapter]
        self.disabled = active is None

    @property
    def p_values(self) -> dict[str, list[int]]:
        """The values of P that each adapter serves, ascending."""
        return {name: config.p_values or [] for name, config in self.configs.items()}

    @property
    def names(self) -> list[str]:
        """The ParScale adapters that are active; others are another method's."""
        active = [self.adapters] if isinstance(self.adapters, str) else self.adapters
        return [name for name in active if name in self.p]

    def current(self) -> ActiveStreams | None:
        """The streams that the next forward pass in this thread uses; None for the backbone."""
        for selection, active in this_thread.forward.chosen:
            if selection is self:
                return active
        names = self.names
        if self.disabled or not names:
            return None
        if len(names) > 1:
            raise ParScaleError(
                f"One ParScale adapter can be active at a time, got {names}. Choose one with "
                "model.set_adapter(name)."
            )
        return ActiveStreams(names[0], self.p[names[0]], (self.p[names[0]],))


class ForwardState:
    """What the modules of a decoder see of the forward pass they are in."""

    def __init__(self) -> None:
        self.active: ActiveStreams | None = None
        # What this thread chose, the latest first; and of each model the latest alone. A forward
        # pass reads the second, so that a compiled one does not depend on how deep blocks nest.
        self.choices: tuple[tuple[Selection, ActiveStreams | None], ...] = ()
        self.chosen: tuple[tuple[Selection, ActiveStreams | None], ...] = ()
        # Where the keys and values of every call of an attention module go, or nowhere.
        self.record: Callable[[nn.Module, Tensor, Tensor], Any] | None = None

    def choose(self, choices: tuple[tuple[Selection, ActiveStreams | None], ...]) -> None:
        self.choices = choices
        self.chosen = tuple(dict(reversed(choices)).items())


class _ThisThread(threading.local):
    """Holds the state one object deeper, for torch.compile.

    It guards no class attribute, and where a graph breaks it forgets what was set on the
    `threading.local` itself.
    """

    def __init__(self) -> None:  # runs in every thread
        self.forward = ForwardState()


this_thread = _ThisThread()


@contextmanager
def choose(selection: Selection, active: ActiveStreams | None) -> Iterator[None]:
    """Run these streams (None: the backbone) inside a `with` block and in this thread only.

    Blocks of one thread nest; one that awaits or yields in the middle lets its choice out into what
    runs meanwhile.
    """
    state, choice = this_thread.forward, (selection, active)
    state.choose((choice, *state.choices))
    try:
        yield
    finally:
        # By identity: tasks and generators may end their blocks in another order.
        state.choose(tuple(x for x in state.choices if x is not choice))
