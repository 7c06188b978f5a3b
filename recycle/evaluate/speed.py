"""Speed of prefill and decoding, and bytes of the key-value cache."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from recycle.parscale import ActiveStreams, choose_streams, find_decoder
from recycle.results import Speed

REPEATS = 3


@torch.no_grad()
def speeds(
    model: nn.Module,
    rows: Mapping[str, ActiveStreams | None],
    prompt_tokens: int,
    new_tokens: int,
    advance: Callable[[int], None] = lambda runs: None,
) -> dict[str, Speed]:
    """Speed of prefill and greedy decoding at batch 1, all rows taking turns in one process.

    Medians over `REPEATS` runs after a warm-up, in text tokens per second.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore
    prompt = (torch.arange(prompt_tokens, device=device) % vocabulary).unsqueeze(0)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(REPEATS + 1):
        for name, active in rows.items():
            with choose_streams(model, active):
                measured[name].append(_time(model, prompt, new_tokens))
            advance(1)
    return {
        name: Speed(  # the first run is a warm-up
            prefill_tokens_per_second=prompt_tokens / statistics.median(x for x, _ in runs[1:]),
            decode_tokens_per_second=new_tokens / statistics.median(x for _, x in runs[1:]),
        )
        for name, runs in measured.items()
    }


def _time(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    cache = DynamicCache(config=find_decoder(model).config)
    started = _clock(prompt.device)
    logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
    prefilled = _clock(prompt.device)
    for _ in range(new_tokens):
        token = logits[:, -1].argmax(-1, keepdim=True)
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
    return prefilled - started, _clock(prompt.device) - prefilled


def _clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def kv_bytes_per_token(
    model: nn.Module, rows: Mapping[str, ActiveStreams | None]
) -> dict[str, int]:
    """Bytes that a token adds to the key-value cache of one sequence, read off a real cache."""
    tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    held = {}
    for name, active in rows.items():
        cache = DynamicCache(config=find_decoder(model).config)
        with choose_streams(model, active):
            model(input_ids=tokens, past_key_values=cache)
        layers = [x for x in cache.layers if getattr(x, "keys", None) is not None]
        held[name] = sum(x.keys.nbytes + x.values.nbytes for x in layers) // 2
    return held
