"""Greedy decoding, whatever a backbone's generation settings say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig


@contextmanager
def greedy_decoding(model: Any) -> Iterator[None]:
    """Leave out of the backbone's generation settings all but its special tokens, for a while.

    Others would change what greedy decoding is: beams, sampling, penalties, forced tokens.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    before = model.generation_config, causal_lm.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(causal_lm.generation_config, name, None) for name in kept}
    if tokens["pad_token_id"] is None:  # what follows the end of a sequence is of no account
        ends = tokens["eos_token_id"]
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    model.generation_config = causal_lm.generation_config = GenerationConfig(
        **tokens, do_sample=False
    )
    try:
        yield
    finally:
        model.generation_config, causal_lm.generation_config = before
