"""Which P a model with ParScale adapters uses: for everyone, or for one thread."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from recycle.parscale import ActiveStreams, choose_streams, streams_of
from recycle.parscale.active import Selection

from .record import FamilyError, listed


def available_p(model: nn.Module) -> list[int]:
    """The values of P that `set_p` takes on this model, ascending; 1 is the backbone itself."""
    return _offered(streams_of(model).selection)


def get_p(model: nn.Module) -> int:
    """The P that the next forward pass in this thread uses.

    Raises:
        FamilyError: A one-stream adapter such as the control is active, which is no member of the
            family.
    """
    active = streams_of(model).selection.current()
    if active is not None and active.num_streams == 1:
        raise FamilyError(
            f"Adapter {active.adapter!r} is active: one stream with a prefix, which is not the "
            "backbone (P = 1). Choose a P with recycle.set_p(model, p)."
        )
    return 1 if active is None else active.num_streams


def set_p(model: nn.Module, p: int) -> None:
    """Use `p` streams from the next forward pass on; 1 is the bare backbone.

    It touches nothing that grows with the model, and leaves alone which parameters are trained. A
    key-value cache belongs to the P that filled it; `shrink_cache` takes one down within a nested
    family.

    Args:
        model: A PEFT model with ParScale adapters, a transformers model into which they were
            loaded, or a wrapper of either, such as `torch.compile` gives.
        p: One of `available_p(model)`.

    Raises:
        FamilyError: The family does not offer `p`.
    """
    selection = streams_of(model).selection
    active = _find(selection, p)
    selection.use(active)
    peft_model = _peft_model(model)
    if active is not None and peft_model is not None:  # it keeps notes of its own
        peft_model.active_adapter = active.adapter
        peft_model.base_model.active_adapter = active.adapter


@contextmanager
def use_p(model: nn.Module, p: int) -> Iterator[None]:
    """Use `p` streams inside a `with` block and in this thread only.

    So two threads can run two Ps on one model. Blocks of one thread nest: do not await or yield in
    the middle of one, since what runs meanwhile in that thread would use `p` too.
    """
    streams = streams_of(model)
    with choose_streams(streams, _find(streams.selection, p)):
        yield


def _peft_model(model: nn.Module) -> PeftModel | None:
    """The PEFT model around the causal LM, also inside any other wrapper; None if bare."""
    for module in model.modules():  # wrappers first
        if isinstance(module, PeftModel):
            return module
        if isinstance(module, PreTrainedModel):
            break
    return None


def _offered(selection: Selection) -> list[int]:
    configs = selection.configs.values()
    offered = {p for config in configs for p in config.p_values or []} - {1}
    if not any(config.backbone_trained for config in configs):
        offered.add(1)
    return sorted(offered)


def _find(selection: Selection, p: int) -> ActiveStreams | None:
    offered = _offered(selection)
    if type(p) is not int or p not in offered:
        by_name = sorted(name for name, p_values in selection.p_values.items() if 1 in p_values)
        also = f" Adapters of one stream are chosen by name: {by_name}." if by_name else ""
        way = f" Use model.set_adapter({p!r})." if p in by_name else also
        raise FamilyError(f"This model offers P = {listed(offered)}, got p={p!r}.{way}")
    if p == 1:
        return None
    names = sorted(selection.p_values, key=lambda name: name not in selection.names)
    name = next(name for name in names if p in selection.p_values[name])
    return ActiveStreams(name, p, (p,))
