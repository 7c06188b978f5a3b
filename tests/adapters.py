"""Tiny models with ParScale adapters whose every parameter matters to the logits."""

from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from recycle.parscale import ParScaleConfig
from tests.tiny import VOCAB_SIZE, tiny_model

NUM_VIRTUAL_TOKENS = 6


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    """Random tokens [B, S], none of them special."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def stream_config(p_values: tuple[int, ...] = (2, 4), **fields: Any) -> ParScaleConfig:
    """A nested config with text starts of random tokens."""
    n = fields.setdefault("num_virtual_tokens", NUM_VIRTUAL_TOKENS)
    fields.setdefault("start_token_ids", token_ids(p_values[-1], n, seed=7).tolist())
    return ParScaleConfig(num_streams=p_values[-1], p_values=list(p_values), **fields)


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> None:
    """Move every adapter parameter, so that no stream is like another and no weight is uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "parscale_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            start = 0 if "aggregator" in name else parameter  # as drawn by torch, or from text
            parameter.copy_(start + 0.3 * noise.to(parameter))


def stream_model(
    backbone: PreTrainedModel | str = "qwen2",
    p_values: tuple[int, ...] = (2, 4),
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModelForCausalLM:
    """A tiny model in eval mode with one adapter, moved away from its start."""
    model = tiny_model(backbone) if isinstance(backbone, str) else backbone
    peft_model = get_peft_model(model, stream_config(p_values, **fields), adapter_name=adapter_name)
    scramble(peft_model)
    return peft_model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits
