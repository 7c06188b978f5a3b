"""Which P of which family a model uses: for everyone, or for one thread.

A family has a name. Its adapters are named `family/member`; those without a slash are of the family
that was loaded first, "default". Where no family is named, it is the one in use: that of the
streams in use in this thread; while P is 1, that which the model was last set to; and before that,
the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from recycle.parscale import ActiveStreams, ParScaleConfig, choose_streams, streams_of
from recycle.parscale.active import Selection, this_thread

from .record import FamilyError, listed

FIRST = "default"


def families(model: nn.Module) -> list[str]:
    """Names of the families on a model, in the order in which they came."""
    return _families(streams_of(model).selection)


def family_of(adapter: str) -> str:
    """Name of the family that an adapter belongs to."""
    return adapter.rpartition("/")[0] or FIRST


def available_p(model: nn.Module, family: str | None = None) -> list[int]:
    """The values of P that `set_p` takes on this model, ascending; 1 is the backbone itself.

    Args:
        model: As for `set_p`.
        family: Name of a family on it; None is the one in use.

    Raises:
        FamilyError: The model has no such family.
    """
    selection = streams_of(model).selection
    return _offered(_members(selection, family))


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


def set_p(model: nn.Module, p: int, family: str | None = None) -> None:
    """Use `p` streams from the next forward pass on; 1 is the bare backbone.

    It touches nothing that grows with the model, and leaves alone which parameters are trained. A
    key-value cache belongs to the P that filled it; `change_p` makes it that of another.

    Args:
        model: A PEFT model with ParScale adapters, a transformers model into which they were
            loaded, or a wrapper of either, such as `torch.compile` gives.
        p: One of `available_p(model, family)`.
        family: Name of a family on the model; None is the one in use.

    Raises:
        FamilyError: The family does not offer `p`, or the model has no such family.
    """
    selection = streams_of(model).selection
    active = _find(selection, p, family)
    selection.use(active)
    peft_model = peft_model_of(model)
    if active is not None and peft_model is not None:  # it keeps notes of its own
        peft_model.active_adapter = active.adapter
        peft_model.base_model.active_adapter = active.adapter


@contextmanager
def use_p(model: nn.Module, p: int, family: str | None = None) -> Iterator[None]:
    """Use `p` streams inside a `with` block and in this thread only; arguments are as for `set_p`.

    So two threads can run two Ps on one model. Blocks of one thread nest: do not await or yield in
    the middle of one, since what runs meanwhile in that thread would use `p` too. `torch.compile`
    makes one graph for each P that blocks use, at any depth, and one for each that `set_p` sets.
    """
    streams = streams_of(model)
    with choose_streams(streams, _find(streams.selection, p, family)):
        yield


def peft_model_of(model: nn.Module) -> PeftModel | None:
    """The PEFT model around the causal LM, also inside any other wrapper; None if bare."""
    for module in model.modules():  # wrappers first
        if isinstance(module, PeftModel):
            return module
        if isinstance(module, PreTrainedModel):
            break
    return None


def _families(selection: Selection) -> list[str]:
    return list(dict.fromkeys(map(family_of, selection.configs)))


def _members(selection: Selection, family: str | None) -> dict[str, ParScaleConfig]:
    """The adapters of a family, those that the model is set to first; none is the one in use."""
    found = _families(selection)
    if family is None:
        here = dict(this_thread.forward.chosen).get(selection)
        names = [here.adapter] if here is not None else selection.names
        family = family_of(names[0]) if names else next(iter(found), FIRST)
    elif family not in found:
        raise FamilyError(f"This model has no family {family!r}; it has {found}.")
    configs, active = selection.configs, selection.names
    ordered = sorted(configs, key=lambda name: name not in active)
    return {name: configs[name] for name in ordered if family_of(name) == family}


def _offered(members: dict[str, ParScaleConfig]) -> list[int]:
    offered = {p for config in members.values() for p in config.p_values or []} - {1}
    if not any(config.backbone_trained for config in members.values()):
        offered.add(1)
    return sorted(offered)


def _find(selection: Selection, p: int, family: str | None) -> ActiveStreams | None:
    members = _members(selection, family)
    offered = _offered(members)
    if type(p) is not int or p not in offered:
        by_name = sorted(name for name, config in members.items() if config.p_values == [1])
        also = f" Adapters of one stream are chosen by name: {by_name}." if by_name else ""
        way = f" Use model.set_adapter({p!r})." if p in by_name else also
        others = [x for x in _families(selection) if p in _offered(_members(selection, x))]
        way += f" Families that offer it: {others}; name one with family=." if others else ""
        name = "This model" if len(_families(selection)) < 2 else "This family of the model"
        raise FamilyError(f"{name} offers P = {listed(offered)}, got p={p!r}.{way}")
    if p == 1:
        return None
    name = next(name for name, config in members.items() if p in (config.p_values or []))
    return ActiveStreams(name, p, (p,))
