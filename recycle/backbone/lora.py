"""A LoRA of PEFT on a backbone: read, put on, and merged into the weights in memory."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import BackboneError, first_line
from .header import read_header
from .source import ADAPTER, ADAPTER_WEIGHTS

NAME = "adapted"  # of the adapter in PEFT
PROBE = 32  # tokens
# Of a log-probability, in the mean: what rounding moves. It moves more where a LoRA changes much,
# and a wrong merge moves it by about as much as the LoRA does.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def lora_targets(folder: Path) -> list[str]:
    """Names of the modules that the LoRA in a folder enters."""
    names = read_header(folder / ADAPTER_WEIGHTS)
    return sorted(
        name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        for name in names
        if ".lora_A." in name
    )


def check_lora(folder: Path) -> None:
    """Refuse a folder that holds no LoRA in safetensors.

    Raises:
        BackboneError: Says what is there.
    """
    for file in (ADAPTER, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise BackboneError(
                f"an adapter is a folder or Hub id with {ADAPTER} and {ADAPTER_WEIGHTS}, and "
                f"{str(folder)!r} has no {file}: name what `save_pretrained` of PEFT wrote"
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{folder / ADAPTER} cannot be read as an adapter's config: {first_line(error)}"
        ) from None
    if not isinstance(config, LoraConfig):
        raise BackboneError(
            f"{folder / ADAPTER} is a {PeftType(config.peft_type).value} adapter, and streams "
            "stand on a LoRA: merge it into the model yourself and name that model"
        )


def put_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a LoRA into a backbone's weights in memory; beside those that are quantised it stays.

    The backbone's files are left as they are. What is given back is frozen and in eval mode.

    Raises:
        BackboneError: It is another backbone's, it is damaged, or it cannot be merged.
    """
    check_lora(folder)
    wrong = (
        f"the LoRA in {str(folder)!r} does not fit the backbone {model.name_or_path!r}: {{}}. Name "
        "the backbone that it was trained on, or a LoRA of this one"
    )
    try:
        with warnings.catch_warnings():  # of missing keys, which are told below
            warnings.simplefilter("ignore")
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=NAME)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise BackboneError(wrong.format(first_line(error).rstrip("."))) from None
    state = get_peft_model_state_dict(peft_model, adapter_name=NAME, save_embedding_layers=False)
    # PEFT saves an output head or embedding that a LoRA enters as well.
    held = [x for x in read_header(folder / ADAPTER_WEIGHTS) if ".base_layer." not in x]
    if differing := sorted(state.keys() ^ set(held)):
        raise BackboneError(wrong.format(f"{len(differing)} tensors differ, first {differing[0]}"))
    peft_model.eval().requires_grad_(False)
    if getattr(model, "is_quantized", False):
        return peft_model.get_base_model()
    beside = _probe(peft_model)
    with peft_model.disable_adapter():
        change = float((beside - _probe(peft_model)).abs().mean())
    merged = peft_model.merge_and_unload()
    off = float((_probe(merged) - beside).abs().mean())
    if not off <= max(change / 2, TOLERANCE[model.dtype]):  # or not finite
        raise BackboneError(
            f"the LoRA in {str(folder)!r} cannot be merged into the weights of "
            f"{model.name_or_path!r}: the merged model computes something else (as where it enters "
            "an output head that is tied to the embedding). Train one that leaves the head alone"
        )
    return merged


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """Log-probabilities of the tokens of a fixed text."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(PROBE, device=embedding.weight.device) * 7 % embedding.num_embeddings
    logits = model(input_ids=ids[None], use_cache=False).logits.float()
    return torch.log_softmax(logits, dim=-1)[0, torch.arange(PROBE - 1), ids[1:]]
