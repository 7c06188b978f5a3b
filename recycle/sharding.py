"""A backbone that is too large for one device: each process holds a part of every layer (FSDP2).

torch's `fully_shard` brings a layer together just before it runs and lets go of it again. What is
put on the backbone afterwards, streams or a LoRA, is none of its business: every process holds it
whole, in float32, and `average_gradients` keeps it equal. So is what lies outside the layers:
embeddings, the last norm and the output head, which are read in more ways than by a forward pass.

All processes must run as many forward and backward passes as each other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from . import world
from .errors import RecycleError
from .parscale import find_decoder

T = TypeVar("T")
WHOLE = "Let every process hold the whole backbone: set launch.parallel=ddp."


class ShardingError(RecycleError):
    """A backbone whose layers cannot be shared out."""


def shard(model: PreTrainedModel, device: str | torch.device) -> None:
    """Share out the layers of a frozen backbone among all processes, in place.

    Args:
        model: A causal LM on the CPU, before anything is put on it. Each layer moves to the device
            and is cut up there before the next one does.
        device: "cpu" or "cuda".

    Raises:
        ShardingError: It is quantised, or its layers are not known or share weights.
    """
    if getattr(model, "is_quantized", False):
        raise ShardingError(f"The weights of a quantised backbone are not cut up. {WHOLE}")
    decoder, name = find_decoder(model), type(model).__name__
    layers = list(_layers(decoder))
    if not layers:
        raise ShardingError(f"transformers marks no module of {name} as a layer. {WHOLE}")
    weights = [weight for layer in layers for weight in layer.parameters()]
    inside = set(weights)
    if len(inside) < len(weights):
        raise ShardingError(f"Layers of {name} share weights. {WHOLE}")
    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (world.size(),))
    outside = {x for x in model.parameters() if x not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params=outside)
    place = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else "cpu"
    for x in (*outside, *model.buffers()):
        x.data = x.data.to(place)
    model._is_fsdp_managed_module = True  # `generate` then runs until all processes are done


def is_sharded(model: nn.Module) -> bool:
    """Whether the layers of a causal LM, or of a PEFT model around one, are shared out."""
    return isinstance(find_decoder(model), FSDPModule)


def once(model: nn.Module, action: Callable[[], T]) -> T:
    """Let the first process do something with a model while the others wait; its result for all.

    With a sharded model no process can do it alone, and all of them do the same.
    """
    return action() if is_sharded(model) else world.once(action)


def share_start(parameters: Iterable[Tensor]) -> None:
    """Give parameters of a sharded model, each of them whole, the first process's values."""
    for parameter in parameters:
        dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of whole parameters over all processes, at the end of a step.

    A parameter that no process used keeps its None.
    """
    parts = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in parameters]
    used = [x.new_zeros(1) if x.grad is None else x.new_ones(1) for x in parameters]
    found = torch.cat([part.flatten() for part in (*used, *parts)])
    dist.all_reduce(found)
    anyone, *averages = found.div_(world.size()).split([len(used), *(x.numel() for x in parts)])
    for number, (x, average) in enumerate(zip(parameters, averages, strict=True)):
        if x.grad is not None or anyone[number] > 0:  # waits for the GPU only where it is missing
            x.grad = average.view_as(x)


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    """The outermost modules that transformers recomputes one by one, each of them once."""
    found: dict[nn.Module, Any] = {}
    for child in module.children():
        found |= {child: None} if _is_layer(child) else dict.fromkeys(_layers(child))
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)
