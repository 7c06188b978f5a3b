"""SIGTERM, by which a scheduler takes a machine back: a training ends with its step, and a
checkpoint; anything else ends at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Preempted(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no error that anything on the way handles."""


class _State:
    asked = False
    deferred = False


def asked() -> bool:
    """Whether SIGTERM came."""
    return _State.asked


def _on_signal(number: int, frame: FrameType | None) -> None:
    _State.asked = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    if not _State.deferred:
        raise Preempted


@contextmanager
def handled() -> Iterator[None]:
    """Raise `Preempted` where SIGTERM comes; in the main thread only."""
    _State.asked = False
    before = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
    finally:
        if not _State.asked:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Let SIGTERM wait until the end of the block, which looks at `asked`."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False
    if _State.asked:
        raise Preempted
