"""What a training learns: added to a model or set free in it, and its values saved and loaded."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recycle.parscale import AdapterParameter, ParScaleConfig, adapter_parameters
from recycle.recipe import Adapt, Method

from .plan import TrainingPlan


def add_streams(
    model: Any,
    plan: TrainingPlan,
    method: Method,
    starts: Tensor,
    quantization: str | None,
) -> PeftModelForCausalLM:
    """Add a training's untrained streams to a backbone, or the PEFT model it became, and use them.

    Args:
        model: The backbone, or what an earlier call returned.
        plan: The training's.
        method: How streams are made.
        starts: `[streams, n]` token ids of the texts that streams start from; a training takes the
            first of them.
        quantization: What the backbone's weights are in, for the record.
    """
    torch.manual_seed(plan.settings.seed)
    text = method.init == "text"
    config = ParScaleConfig(
        num_streams=plan.num_streams,
        p_values=list(plan.p_values),
        num_virtual_tokens=method.num_virtual_tokens,
        smoothing=method.smoothing,
        init=method.init,
        start_token_ids=starts[: plan.num_streams].tolist() if text else None,
        backbone_trained=plan.all_weights,
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        backbone_quantization=quantization,
    )
    if isinstance(model, PeftModelForCausalLM):
        model.add_adapter(plan.adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=plan.adapter)
    model.set_adapter(plan.adapter)
    if plan.all_weights:
        free_weights(model.get_base_model())
    return model


def add_lora(model: nn.Module, plan: TrainingPlan, adapt: Adapt) -> PeftModelForCausalLM:
    """Add a training's untrained LoRA to a backbone: a plain one of PEFT, in float32."""
    torch.manual_seed(plan.settings.seed)
    targets = adapt.target_modules
    config = LoraConfig(
        r=adapt.rank,
        lora_alpha=adapt.alpha,
        target_modules=targets[0] if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, adapter_name=plan.adapter)


def free_weights(model: nn.Module) -> nn.Module:
    """Let all weights learn: in float32, whatever they compute in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.requires_grad_(True)


def learned_parameters(model: nn.Module, plan: TrainingPlan) -> list[AdapterParameter]:
    """Every parameter that learns, each with the group that its learning rate is of."""
    of_streams = adapter_parameters(model, plan.adapter)
    group = {id(x.parameter): x.group for x in of_streams}
    rest = "full" if plan.all_weights else "lora"
    return [
        AdapterParameter(name, parameter, group.get(id(parameter), rest))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or id(parameter) in group
    ]


def save_learned(learned: list[AdapterParameter], file: Path) -> None:
    """Write what was learned so far, by the parameters' names in the model."""
    state = {x.name: x.parameter.detach().cpu().contiguous() for x in learned}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.tmp")
    save_file(state, part, metadata={"format": "pt"})  # straight to the disk: it may be a model
    os.replace(part, file)


def load_learned(learned: list[AdapterParameter], file: Path) -> None:
    """Set the parameters to what `save_learned` wrote."""
    state = load_file(file)
    for x in learned:
        x.parameter.data.copy_(state[x.name])
