"""Memory of a device: how much a process can have, how much it has, and the most that it had."""

import os
import threading
from pathlib import Path
from typing import Self

import psutil  # comes with accelerate
import torch

from .passes import count_anew, peak_memory

GLANCE = 2e-3  # seconds between two looks at a process's memory
# Of a container: its limit in bytes and what is used of it, in version 2 of cgroups and in 1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def held(device: torch.device) -> int:
    """Bytes that this process has: in tensors on a GPU, or else in all."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def capacity(device: torch.device) -> int:
    """Bytes that this process can have, with those that it has; those on a CPU share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    for limit, used in ((Path(a), Path(b)) for a, b in CGROUPS):
        if limit.is_file() and (most := limit.read_text().strip()).isdecimal():
            free = min(free, int(most) - int(used.read_text()))
    return held(device) + int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Peak:
    """A context manager: `bytes` is the most that this process had inside, or has had so far.

    A GPU's allocator counts. On a CPU the system does where it is more than ever before; below
    that, since its count cannot be set back, a thread looks every 2 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            count_anew(self.device)
        else:
            self._before = peak_memory(self.device)
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._over.set()
        self._thread.join()
        if (peak := peak_memory(self.device)) > self._before:
            self.bytes = peak

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(GLANCE):
            self.bytes = max(self.bytes, process.memory_info().rss)
