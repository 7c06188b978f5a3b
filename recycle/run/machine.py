"""The machine that a run uses: its device, what it computes in, and its description."""

import os

import torch

from recycle import results
from recycle.cost import Gpu, find_gpu
from recycle.cost.gpu import DEFAULT, known_as
from recycle.recipe import Backbone, Launch

from .folder import RunError

# What accelerate and torch take from the environment and that changes arithmetic or how the
# training runs, behind the recipe's back. How many processes there are is a launcher's to say.
SWITCHES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
OFF = ("", "0", "no", "false")


def check_environment() -> None:
    """Refuse what the environment would switch on behind the recipe's back.

    Raises:
        RunError: Names the variables.
    """
    found = [name for name in SWITCHES if os.environ.get(name, "").lower() not in OFF]
    if found:
        settings = ", ".join(f"{name}={os.environ[name]}" for name in found)
        raise RunError(
            f"The environment sets {settings}, which would change the arithmetic of this run "
            "without its recipe saying so. Unset it (`unset NAME`, or `mixed_precision: no` in the "
            "configuration of accelerate), and set backbone.dtype in the recipe instead."
        )


def device_of(launch: Launch) -> str:
    """The device that a run takes: "cpu", "cuda" or "mps".

    Raises:
        RunError: There is no such device, or not one for each process.
    """
    check_environment()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    device: str = launch.device
    if device == "auto":
        device = next(name for name, available in there.items() if available)
    elif not there[device]:
        name = device.upper()
        raise RunError(
            f"launch.device={device}, but torch sees no {name} device. Use launch.device=auto."
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cpu" and (count := torch.get_device_module(device).device_count()) < local:
        raise RunError(
            f"Each process takes a GPU of its own: there are {local} processes on this machine, "
            f"and torch sees {count} GPUs. Set launch.processes to at most that."
        )
    return device


def with_dtype(backbone: Backbone, device: str) -> Backbone:
    """Settle dtype `auto`: a CPU that emulates bfloat16 is slower in it than in float32."""
    if backbone.dtype != "auto":
        return backbone
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return backbone.model_copy(update={"dtype": "bfloat16" if native else "float32"})


def describe(device: str) -> results.Hardware:
    """The machine, for the record."""
    if device == "cpu":
        return results.hardware()
    if device == "mps":  # of the main memory, the part that torch may take
        memory = torch.mps.recommended_max_memory() / 2**30
        return results.hardware(torch.backends.mps.get_name(), memory)
    properties = torch.cuda.get_device_properties(0)
    return results.hardware(properties.name, properties.total_memory / 2**30)


def gpu_here(name: str | None = None) -> tuple[Gpu, str]:
    """The GPU that inference is estimated for, and why it is that one.

    Args:
        name: The one that was asked for; None takes this machine's, where its figures are known.
    """
    if name is not None:
        return find_gpu(name), "as asked"
    if not torch.cuda.is_available():
        return find_gpu(DEFAULT), "this machine has no GPU"
    properties = torch.cuda.get_device_properties(0)
    if gpu := known_as(properties.name, properties.total_memory / 2**30):
        return gpu, "this machine's"
    return find_gpu(DEFAULT), f"the figures of this machine's {properties.name} are not known"
