"""Quantised weights: what a checkpoint is stored in, what it is loaded in, how it computes."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .errors import BackboneError

TRAINABLE = ("nf4", "int8")  # bitsandbytes' formats that streams are tested on


def stored_quantization(config: dict[str, Any]) -> str | None:
    """The format that a config.json names, of the whole model or of its text part."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if not found:
        return None
    if not isinstance(found, dict):
        return f"an unknown method ({found!r})"
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4"))  # the default of bitsandbytes
    if found.get("load_in_8bit"):
        return "int8"
    return str(found.get("quant_method"))


def settle_quantization(name: str, stored: str | None, asked: str | None) -> str | None:
    """What the weights will be in, of what they are stored in and what was asked for.

    Raises:
        BackboneError: The two are not the same, or prefixes cannot learn on the stored one.
    """
    if stored not in (None, *TRAINABLE):
        raise BackboneError(
            f"the weights of {name!r} are stored in {stored} (quantization_config in its "
            "config.json), and streams learn on unquantised weights, or on "
            f"{' and '.join(TRAINABLE)} of bitsandbytes: take the unquantised model, with "
            "backbone.quantization=nf4 where memory is short"
        )
    if None not in (stored, asked) and asked != stored:
        raise BackboneError(
            f"the weights of {name!r} are stored in {stored}, and backbone.quantization={asked} "
            f"asks for other ones: leave it out, set {stored}, or take the unquantised model"
        )
    return stored or asked


def quantization_config(quantization: str, dtype: str | torch.dtype | None) -> BitsAndBytesConfig:
    """How bitsandbytes is to load a backbone's weights.

    Args:
        quantization: "int8" or "nf4", which is doubly quantised.
        dtype: What it computes in.

    Raises:
        BackboneError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"weights in {quantization} need bitsandbytes: `pip install 'recycle-lm[train]'`. To "
            "use them as they are stored, set backbone.quantization=none, or in Python pass "
            "quantization_config=None"
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def keep_gradients_of_4bit_layers(model: nn.Module) -> None:
    """Switch off the repacking of nf4 weights on AVX512-BF16 CPUs.

    It happens at the first forward pass in eval mode, and the gradients of everything below
    silently become None from then on.
    """
    for module in _4bit_layers(model):
        module.support_avx512bf16_for_cpu = False


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that was stored quantised compute in `dtype`, as one quantised while loading.

    transformers loads such a model with the dtypes that it was saved with, whatever it is asked
    for. Parameters that are not in the model's main dtype (float32 routers) stay as they are.
    """
    main = model.dtype
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.dtype == main:  # not a quantised one
            parameter.data = parameter.data.to(dtype)
    for module in _4bit_layers(model):
        module.compute_dtype = dtype
        module.weight.quant_state.dtype = dtype  # that its values are unpacked to


def _4bit_layers(model: nn.Module) -> list[Any]:
    """Of a class of bitsandbytes, which need not be installed."""
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
