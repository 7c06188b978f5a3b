"""Tiny random models and a tiny tokenizer: what the tests use in place of a real backbone.

from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 384
BOS, EOS, PAD = "<bos>", "<|endoftext|>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# What the merges are learned from; short, so that the tokenizer takes milliseconds to train.
TEXT = '''\
def merge(left, right):
    """Return the sorted union of two sorted lists."""
    result = []
    while left and right:
        if left[0] < right[0]:
            result.append(left.pop(0))
        else:
            result.append(right.pop(0))
    return result + left + right

class Reader:
    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self.encoding = encoding

    def read(self):
        with open(self.path, encoding=self.encoding) as stream:
            return stream.read()

The quick brown fox jumps over the lazy dog. A model with more streams is better than one without.
for name in self.names: raise ValueError(f"not a name: {name!r}, expected one of {self.names}")
import os, sys, json; from collections import defaultdict; None is not True and not False
'''

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.2,
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}


def tiny_config(model_type: str = "qwen2", **overrides: Any) -> Any:
    """The configuration of a tiny model; `overrides` are fields of that model type's class.

    Model types that take the usual names (qwen2, llama, mistral, qwen3, gemma2, ...) work without
    overrides, others need their own names for the sizes.
    """
    sizes = _GPT2_SIZES if model_type == "gpt2" else _SIZES
    return AutoConfig.for_model(model_type, **{**_COMMON, **sizes, **overrides})


def tiny_model(model_type: str = "qwen2", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal LM in float32 and eval mode, the same for the same arguments.

    Weights have a standard deviation of 0.2, so that logits of different tokens differ by more
    than any rounding does, and biases are not zero, so that a lost one is seen.
    `attn_implementation` may be given among the overrides ("eager" or "sdpa"; where it is not,
    transformers' own choice, sdpa for most).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attn_implementation = overrides.pop("attn_implementation", None)
        config = tiny_config(model_type, **overrides)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 384 entries: every text round-trips through it.

    Beginning, end and padding have the ids 0, 1, 2; nothing is added to a text by itself, and there
    is a simple chat template.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=EOS,  # never needed, but some tokenizer classes add one of their own
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(
    folder: str | Path, model_type: str = "qwen2", seed: int = 0, **overrides: Any
) -> Path:
    """Write `tiny_model(...)` and the tokenizer into `folder` as a model folder."""
    folder = Path(folder)
    tiny_model(model_type, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
