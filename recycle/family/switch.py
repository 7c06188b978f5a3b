"""Which P a model with ParScale adapters uses: for everyone, or for one thread."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from recycle.parscale.config import ParScaleConfig
from recycle.parscale.prefix import ActiveStreams, StreamLayer
from recycle.parscale.streams import DecoderStreams, choose_streams

from .folder import FamilyError


def available_p(model: nn.Module) -> list[int]:
    """The values of P that `set_p` takes on this model, ascending; 1 is the backbone itself."""
    p_values = _decoder_streams(model).p_values
    offered = {p for served in p_values.values() for p in served if p > 1}
    if not any(config.backbone_trained for config in parscale_configs(model).values()):
        offered.add(1)
    return sorted(offered)


def get_p(model: nn.Module) -> int:
    """The P that the next forward pass in this thread uses.

    Raises:
        FamilyError: A one-stream adapter such as the control is active, which is no member of the
            family.
    """
    streams = _decoder_streams(model).selection()
    if streams is not None and streams.num_streams == 1:
        raise FamilyError(
            f"Adapter {streams.adapter!r} is active: one stream with a prefix, which is not the "
            "backbone (P = 1). Choose a P with recycle.set_p(model, p)."
        )
    return 1 if streams is None else streams.num_streams


def set_p(model: nn.Module, p: int) -> None:
    """Use `p` streams from the next forward pass on; 1 disables the adapters: the bare backbone.

    A key-value cache belongs to the P that filled it; `shrink_cache` takes one down within a nested
    family.

    Args:
        model: A PEFT model with ParScale adapters, a transformers model into which they were
            loaded, or a wrapper of either, such as `torch.compile` gives.
        p: One of `available_p(model)`.

    Raises:
        FamilyError: The family does not offer `p`.
    """
    streams = _find(model, p)
    if streams is not None:
        _decoder_streams(model).p[streams.adapter] = p
    for module in model.modules():
        if isinstance(module, StreamLayer):
            module.enable_adapters(streams is not None)
    if streams is None:
        return
    inference_mode = parscale_configs(model)[streams.adapter].inference_mode
    for module in model.modules():
        if isinstance(module, PeftModel):  # it keeps a note of its own of what is active
            module.set_adapter(streams.adapter, inference_mode=inference_mode)
            return
    for module in model.modules():
        if isinstance(module, StreamLayer):
            module.set_adapter(streams.adapter, inference_mode=inference_mode)


@contextmanager
def use_p(model: nn.Module, p: int) -> Iterator[None]:
    """Use `p` streams inside a `with` block and in this thread only.

    So two threads can run two Ps on one model. Blocks of one thread nest: do not await or yield in
    the middle of one, since what runs meanwhile in that thread would use `p` too.
    """
    with choose_streams(_decoder_streams(model), _find(model, p)):
        yield


def parscale_configs(model: nn.Module) -> dict[str, ParScaleConfig]:
    """The configs of the adapters that are on the model, by name."""
    configs: dict[str, ParScaleConfig] = {}
    for module in model.modules():
        configs |= getattr(module, "peft_config", None) or {}
    return {name: configs[name] for name in _decoder_streams(model).p_values}


def _decoder_streams(model: nn.Module) -> DecoderStreams:
    for module in model.modules():
        if isinstance(module, DecoderStreams):
            return module
    raise FamilyError(
        f"{type(model).__name__} has no ParScale adapter. Load one with recycle.load(folder), or "
        "add one with peft.get_peft_model(model, recycle.parscale.ParScaleConfig(...))."
    )


def _find(model: nn.Module, p: int) -> ActiveStreams | None:
    layer = _decoder_streams(model)
    offered = available_p(model)
    if type(p) is not int or p not in offered:
        raise FamilyError(f"This model offers P = {listed(offered)}, got p={p!r}.")
    if p == 1:
        return None
    names = sorted(layer.p_values, key=lambda name: name not in layer.active_adapters)
    name = next(name for name in names if p in layer.p_values[name])
    return ActiveStreams(name, p, (p,))


def listed(offered: list[int]) -> str:
    return ", ".join(map(str, offered)) or "nothing but its one-stream adapter"
