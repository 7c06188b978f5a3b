"""A few of a model's weights, by which streams know the model that they were trained on.

The fingerprint knows a backbone by its files, before it is loaded. This one knows a model in
memory, however it came there: also one without the LoRA that streams stand on, which would run and
be wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MODULES, VALUES = 4, 16  # in the sample

Sample = dict[str, dict[str, list[Any]]]
"""Module name -> `indices` into its flat weight, and their `values`. Where weights were adapted,
there is more: the values `before`, or in place of both the `change` by a LoRA beside them."""


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the modules with a matrix of weights, but for embeddings."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | BaseTunerLayer) and _weight(module) is not None
    ]


def watch(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights of a few modules, evenly spaced among `names`.

    Of a sharded model all processes take them together, here and in `take_sample`.
    """
    step = max(1, len(names) // MODULES)
    found = {name: _weight(model.get_submodule(name)) for name in names[::step][:MODULES]}
    return {name: _whole(x).detach().clone() for name, x in found.items() if x is not None}


def take_sample(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> Sample:
    """Weights of a model; where it was adapted, those that changed most against their size.

    Args:
        model: As the streams see it; nothing is taken of quantised weights alone.
        before: What `watch` gave of it before its weights were adapted.
    """
    sample: Sample = {}
    watched = watch(model, linear_modules(model)) if before is None else before
    for name, old in watched.items():
        module = model.get_submodule(name)
        new, change = _weight(module), _change_beside(module)
        if change is not None:
            indices = change.flatten().abs().topk(min(VALUES, change.numel())).indices
            sample[name] = {"indices": indices.tolist(), "change": _at(change, indices).tolist()}
        elif new is not None and new.is_floating_point():
            new = _whole(new).to(old.device)
            w = old.flatten().float()
            indices = torch.arange(0, w.numel(), max(1, w.numel() // VALUES))[:VALUES]
            if before is not None:
                moved = (new.flatten().float() - w).abs() / (w.abs() + w.abs().mean())
                indices = moved.topk(min(VALUES, moved.numel())).indices
            sample[name] = {"indices": indices.tolist(), "values": _at(new, indices).tolist()}
            if before is not None:
                sample[name]["before"] = _at(old, indices).tolist()
    return sample


def fits(model: nn.Module, sample: Sample, dtype: str | None, lora: bool) -> bool:
    """Whether a model has the weights of a sample, within rounding, rather than those before.

    What cannot be told passes: quantised weights, and weights that are not in memory.

    Args:
        model: Any.
        sample: What `take_sample` gave.
        dtype: What the model computed in then.
        lora: It had been adapted by a LoRA, which quantised weights have beside them.
    """
    modules = dict(model.named_modules())
    off = size = moved = distance = 0.0  # sums over the sample
    eps = torch.finfo(getattr(torch, dtype or "bfloat16")).eps
    for name, kept in sample.items():
        if name not in modules:
            return False
        weight, change = _weight(modules[name]), _change_beside(modules[name])
        if change is None and weight is not None and not weight.is_floating_point():
            if lora:
                return False
            continue
        values = torch.tensor(kept.get("values", kept.get("change")))
        before = torch.tensor(kept.get("before", kept.get("values", [0.0] * len(values))))
        if change is not None and "values" in kept:
            values, before = values - before, torch.zeros(len(values))
        elif change is None and "change" in kept:
            continue  # merged, perhaps
        held = weight if change is None else change
        indices = torch.tensor(kept["indices"])
        if held is None or held.is_meta:
            continue
        if indices.max() >= held.numel():
            return False
        now = _at(held, indices)
        eps = max(eps, torch.finfo(held.dtype).eps)
        size += sum(map(abs, kept.get("values", kept.get("change", []))))
        off += float((now - values).abs().sum())
        distance += float((now - before).abs().sum())
        moved += float((values - before).abs().sum())
    told_apart = moved > eps * size
    return off <= max(moved / 2, eps * size) and (off <= distance or not told_apart)


def _change_beside(module: nn.Module) -> Tensor | None:
    """What a LoRA beside a module's weights adds to them."""
    if not isinstance(module, BaseTunerLayer) or module.merged or not module.active_adapters:
        return None
    return module.get_delta_weight(module.active_adapters[0])


def _at(weight: Tensor, indices: Tensor) -> Tensor:
    return weight.detach().flatten()[indices.to(weight.device)].float().cpu()


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None
