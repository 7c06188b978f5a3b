"""Decoding as it is asked for, whatever a backbone's generation settings say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

GREEDY = 1e-4  # a lower temperature leaves one token, and dividing by it overflows


@contextmanager
def decoding(model: Any, temperature: float = 0.0, top_p: float = 1.0) -> Iterator[None]:
    """Leave out of the backbone's generation settings all but its special tokens, for a while.

    Others would change what is decoded: beams, penalties, forced tokens, a temperature.

    Args:
        model: A causal LM, or a PEFT model around one.
        temperature: Of sampling; below 1e-4 it is greedy decoding.
        top_p: Sample from the likeliest tokens that hold this share of the probability.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    before = model.generation_config, causal_lm.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(causal_lm.generation_config, name, None) for name in kept}
    if tokens["pad_token_id"] is None:  # what follows the end of a sequence is of no account
        ends = tokens["eos_token_id"]
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature >= GREEDY:  # transformers would keep the 50 likeliest where top_k is not said
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    model.generation_config = causal_lm.generation_config = GenerationConfig(**tokens, **sampling)
    try:
        yield
    finally:
        model.generation_config, causal_lm.generation_config = before
