"""The adapter that a training starts from."""

from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model
from torch import Tensor

from recycle.parscale import ParScaleConfig
from recycle.recipe import Method

from .plan import TrainingPlan


def add_adapter(
    model: Any,
    plan: TrainingPlan,
    method: Method,
    starts: Tensor,
    quantization: str | None,
) -> PeftModelForCausalLM:
    """Add a training's untrained adapter to a backbone, or the PEFT model it became, and use it.

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
        backbone_dtype=str(model.dtype).removeprefix("torch."),
        backbone_quantization=quantization,
    )
    if isinstance(model, PeftModelForCausalLM):
        model.add_adapter(plan.adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=plan.adapter)
    model.set_adapter(plan.adapter)
    return model
