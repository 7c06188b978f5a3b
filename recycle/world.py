"""The processes of a run: which of them this is, and what they tell each other.

torchrun, or `launch.processes`, starts them; alone, a process is a world of one. All of them run
the same code. What only one may do (write, read the data) goes through `once`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import RecycleError

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=30)  # how long the others wait for one that reads or measures
_patient: list[Any] = []  # the group that has it


class OtherProcessError(RecycleError):
    """Another process of this run has failed, and has said why."""


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this is the one that talks and writes."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Connect the processes of a run, each with a GPU of its own where there are GPUs.

    Args:
        device: "cpu" or "cuda".
    """
    before, failed = dist.is_initialized(), True
    if size() > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        _patient[:] = [dist.new_group(backend="gloo", timeout=PATIENCE)]
    try:
        yield
        failed = False
    finally:
        _patient.clear()
        # Of several processes one that fails just ends: in NCCL it would wait for the others here.
        ends = not (failed and size() > 1)
        if ends and dist.is_initialized() and not before:  # accelerate has one also where size is 1
            dist.destroy_process_group()


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Leave random numbers as they were, of the CPU and this device; another GPU is not touched."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device])


def gather(value: T) -> list[T]:
    """What every process passes, in the order of their ranks."""
    if not _patient:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value, group=_patient[0])
    return found


def once(action: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; its result for all of them.

    Raises:
        OtherProcessError: In the others, where the first one fails.
    """
    if not _patient:
        return action()
    told: list[Any] = [None, None]
    if not is_first():
        dist.broadcast_object_list(told, group=_patient[0])
        if told[1] is not None:
            raise OtherProcessError(told[1])
        return told[0]
    try:
        told[0] = action()
    except Exception as error:
        dist.broadcast_object_list([None, str(error)], group=_patient[0])
        raise
    dist.broadcast_object_list(told, group=_patient[0])
    return told[0]


def share(items: Sequence[T], action: Callable[[T], R]) -> list[R]:
    """Do something for every item, each process for some; the results in the items' order.

    All processes make as many calls, which a sharded model needs: one that has no item left does
    the last one again.
    """
    rounds = range(0, len(items), size())
    mine = [action(items[min(start + rank(), len(items) - 1)]) for start in rounds]
    return in_order(mine, len(items))


def in_order(mine: list[R], count: int) -> list[R]:
    """What the processes found one by one of so many items, as `share` deals them out."""
    return [x for dealt in zip(*gather(mine), strict=True) for x in dealt][:count]


def fails_first() -> bool:
    """Whether this process is the first of them to fail; the first one says why."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"recycle-failed-{attempt}", 1) == 1
    except (KeyError, RuntimeError):  # there is no store, or its host has ended
        return is_first()


def is_lost(error: BaseException) -> bool:
    """Whether an error is that another process is gone."""
    lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return size() > 1 and isinstance(error, RuntimeError) and lost


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _patient:
        dist.all_reduce(values)
    return values
