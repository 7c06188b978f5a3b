"""GPUs: what costs are computed from, read from `gpus.yaml`."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

from recycle.errors import RecycleError

DEFAULT = "h200"
FILE = Path(__file__).with_name("gpus.yaml")
# Words of torch's name for a GPU that are in no name here; sizes are told by its memory.
_MAKERS = re.compile(r"nvidia|geforce|tesla|sxm\d*|hbm\d\w*|\d+gb")


class CostError(RecycleError):
    """Something cannot be estimated as asked for."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_gib: float
    bandwidth: float
    """GB/s of its memory."""
    tflops: float
    """TFLOP/s of dense matrices in `dtype`."""
    float32: float
    """The same in float32."""
    dtype: str = "bfloat16"
    """16-bit format that it computes in."""

    @property
    def settled_dtype(self) -> str:
        """What a run's dtype `auto` becomes: float32 where bfloat16 is emulated."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    def flops(self, dtype: str) -> float:
        """Operations a second, at best."""
        return 1e12 * (self.float32 if dtype == "float32" else self.tflops)


@cache
def gpus() -> dict[str, Gpu]:
    """All that are known, by name."""
    entries = YAML(typ="safe").load(FILE.read_text("utf-8"))
    return {name: Gpu(name=name, **fields) for name, fields in entries.items()}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        CostError: It is not known; lists those that are.
    """
    if found := gpus().get(name.lower()):
        return found
    known = ", ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in gpus().values())
    raise CostError(
        f"--gpu takes a GPU whose figures are known, got {name!r}. Known are {known}. Take the "
        f"nearest, or add a line to {FILE}."
    )


def known_as(device_name: str, memory_gib: float) -> Gpu | None:
    """The GPU that torch calls `device_name`; None where its figures are not known."""

    def words(name: str) -> list[str]:
        return [x for x in re.split(r"[\s-]+", name.lower()) if not _MAKERS.fullmatch(x)]

    return next(
        (
            gpu
            for gpu in gpus().values()
            if words(gpu.name) == words(device_name)
            and abs(gpu.memory_gib - memory_gib) < 0.1 * gpu.memory_gib
        ),
        None,
    )
