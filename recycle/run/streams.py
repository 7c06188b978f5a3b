"""The second stage: streams learn on the model that the first one left."""

from typing import Any

from peft import PeftModelForCausalLM
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from recycle import world
from recycle.backbone import load_backbone
from recycle.backbone.fingerprint import fingerprint_model
from recycle.backbone.sample import take_sample
from recycle.family import Family, FamilyError
from recycle.family.adapters import attach, save_family
from recycle.family.folder import BACKBONE, find_folder, read_members
from recycle.parscale import cut_state, nest_states
from recycle.progress import Silent
from recycle.results import TrainingRecord
from recycle.train import add_streams, train
from recycle.train.checkpoints import writing

from .materials import Materials
from .plan import RunPlan
from .weights import Foundation, round_weights

States = dict[int, dict[str, Tensor]]
"""P -> the tensors of a plain adapter with that P."""


def train_streams(
    plan: RunPlan,
    materials: Materials,
    foundation: Foundation,
    starts: States,
    progress: Silent,
) -> tuple[PeftModelForCausalLM, tuple[TrainingRecord, ...]]:
    """Train the adapters of a plan and write the family into the run folder.

    Args:
        plan: The run's.
        materials: Its data.
        foundation: What the streams are put on.
        starts: What `states_to_start_from` gave; a control that it lacks starts anew.
        progress: Shows how far it is.

    Returns:
        The model with all of them, and the record of each training.
    """
    recipe, splits = plan.recipe, materials.splits
    model: Any = foundation.model
    dtypes = {name: x.dtype for name, x in model.named_parameters()}
    quantization = materials.source.quantization
    records = []
    for training in plan.streams:
        model = add_streams(model, training, recipe.method, splits.starts, quantization)
        if starts.keys() >= set(training.p_values):
            state = nest_states({p: starts[p] for p in training.p_values})
            set_peft_model_state_dict(model, state, adapter_name=training.adapter)
        batch_size = recipe.evaluation.batch_size
        records.append(
            train(model, training, splits.train[-1], splits.validation[-1], batch_size, progress)
        )
    if not plan.streams[0].all_weights:
        sample = take_sample(model.get_base_model(), foundation.before)
        basis = foundation.source.fingerprint, sample
        world.once(lambda: _save(model, plan, *basis))
        return model, tuple(records)
    round_weights(model.get_base_model(), dtypes)
    return _with_own_backbone(model, plan, materials), tuple(records)


def _save(model: PeftModelForCausalLM, plan: RunPlan, *basis: Any) -> None:
    with writing(plan.folder):
        save_family(model, plan.folder, *basis)


def states_to_start_from(plan: RunPlan) -> States:
    """The tensors of the family that the recipe's streams start from, by P; nothing without one.

    Raises:
        FamilyError: It has other values of P, or its streams are made in another way.
    """
    method, stage = plan.recipe.method, plan.recipe.stages.streams
    if stage.start is None:
        return {}
    folder = find_folder(stage.start, None)
    family = Family.read(folder)
    states: States = {}
    for member in read_members(folder, family):
        for name in ("num_virtual_tokens", "smoothing"):
            theirs, ours = getattr(member.config, name), getattr(method, name)
            if theirs != ours:
                raise FamilyError(
                    f"{stage.start} has streams of {name} = {theirs}, and method.{name} = {ours}. "
                    "Set it to the family's."
                )
        states |= {p: cut_state(member.state, p) for p in member.config.p_values or []}
    if lacking := sorted(set(plan.recipe.streams) - states.keys()):
        raise FamilyError(
            f"{stage.start} has streams for P = {sorted(states)}, and not for P = {lacking}. Set "
            "streams to some of those that it has."
        )
    if stage.nested and not family.nested and len(plan.recipe.streams) > 1:
        raise FamilyError(
            f"Each P of {stage.start} has streams of its own, which cannot be nested. Set "
            "stages.streams.nested=false, or one number of streams."
        )
    return states


def _with_own_backbone(
    model: PeftModelForCausalLM, plan: RunPlan, materials: Materials
) -> PeftModelForCausalLM:
    """Write weights that learned together with the streams, and the family; load it from there."""
    folder = plan.folder / BACKBONE
    causal_lm = model.get_base_model()

    def save() -> None:
        weights = {k: x for k, x in causal_lm.state_dict().items() if "parscale_" not in k}
        with writing(folder):
            causal_lm.save_pretrained(folder, state_dict=weights)
            materials.tokenizer.save_pretrained(folder)
            save_family(model, plan.folder, fingerprint_model(folder.absolute()))

    world.once(save)
    base = own_foundation(plan)
    assert base is not None
    return attach(base.model, read_members(plan.folder, Family.read(plan.folder)), plan.folder)


def own_foundation(plan: RunPlan) -> Foundation | None:
    """The model whose weights learned together with the streams; None where they did not."""
    if not plan.streams[0].all_weights:
        return None
    folder = str((plan.folder / BACKBONE).absolute())
    local = plan.recipe.backbone.model_copy(update={"id": folder, "revision": None})
    model, _, source = load_backbone(local, plan.device)
    return Foundation(model, source)
