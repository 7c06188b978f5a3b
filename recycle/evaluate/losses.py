"""Loss, speed and cache size of a model, for the backbone, the control and each P.

Dimensions: B documents, S tokens of a block, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from recycle.data import Document
from recycle.parscale.initialise import find_decoder
from recycle.parscale.prefix import ActiveStreams
from recycle.parscale.streams import DecoderStreams, choose_streams
from recycle.results import Speed

REPEATS = 3


@dataclass(frozen=True)
class Contender:
    """One model of a comparison: its name in tables, and its streams (None: the backbone)."""

    name: str
    streams: ActiveStreams | None

    @property
    def num_streams(self) -> int:
        return 1 if self.streams is None else self.streams.num_streams


def contenders(layer: DecoderStreams) -> list[Contender]:
    """The backbone, one-stream adapters such as the control, and each P, as in the table."""
    found = [Contender("backbone", None)]
    members = sorted((p, name) for name, p_values in layer.p_values.items() for p in p_values)
    for p, name in members:
        title = name if p == 1 else f"P = {p}"
        found.append(Contender(title, ActiveStreams(name, p, (p,))))
    return found


def range_advice(model: nn.Module) -> str:
    """What to do about a loss that is not finite where the backbone's number format may be why."""
    if model.dtype != torch.float16:
        return ""
    return (
        "float16 ends at 65,504, which the hidden states of some models exceed: set "
        "backbone.dtype=bfloat16 or backbone.dtype=float32. "
    )


def passes(models: Sequence[Contender]) -> list[list[Contender]]:
    """Group the models that one pass of the decoder serves: all the P of a nested adapter."""
    grouped: dict[str | None, list[Contender]] = {}
    for model in models:
        adapter = None if model.streams is None else model.streams.adapter
        grouped.setdefault(adapter, []).append(model)
    return list(grouped.values())


@torch.no_grad()
def document_losses(
    model: nn.Module,
    layer: DecoderStreams,
    models: Sequence[Contender],
    documents: Sequence[Document],
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, list[float]]:
    """Mean loss of every document's block, in nats per predicted token.

    Args:
        model: The PEFT model.
        layer: Its decoder's streams.
        models: What to evaluate; members of one nested adapter share a pass.
        documents: One block each.
        batch_size: Documents in a pass.
        advance: Called with the stream-tokens done.

    Returns:
        Losses by contender's name, in the documents' order.
    """
    losses: dict[str, list[float]] = {contender.name: [] for contender in models}
    device = next(model.parameters()).device
    with _eval_mode(model):
        for group in passes(models):
            streams = _together(group)
            for start in range(0, len(documents), batch_size):
                batch = documents[start : start + batch_size]
                tokens = torch.tensor([document.input_ids for document in batch], device=device)
                with choose_streams(layer, streams):
                    logits = model(input_ids=tokens, use_cache=False).logits
                rows = iter(logits)  # [S, V] of each P's documents, the first P first
                for contender in group:
                    for row in tokens:
                        losses[contender.name].append(_mean_loss(next(rows), row))
                advance(tokens.numel() * (1 if streams is None else streams.num_streams))
    return losses


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _together(group: Sequence[Contender]) -> ActiveStreams | None:
    last = group[-1].streams
    if last is None:
        return None
    return ActiveStreams(last.adapter, last.num_streams, tuple(c.num_streams for c in group))


def _mean_loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:-1].float(), tokens[1:]).item()


@torch.no_grad()
def speeds(
    model: nn.Module,
    layer: DecoderStreams,
    models: Sequence[Contender],
    prompt_tokens: int,
    new_tokens: int,
    advance: Callable[[int], None] = lambda runs: None,
) -> dict[str, Speed]:
    """Speed of prefill and greedy decoding at batch 1, all models taking turns in one process.

    Medians over `REPEATS` runs after a warm-up, in text tokens per second.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore
    prompt = (torch.arange(prompt_tokens, device=device) % vocabulary).unsqueeze(0)
    measured: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in models}
    with _eval_mode(model):
        for _ in range(REPEATS + 1):
            for contender in models:
                with choose_streams(layer, contender.streams):
                    measured[contender.name].append(_time(model, prompt, new_tokens))
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def kv_bytes_per_token(
    model: nn.Module, layer: DecoderStreams, models: Sequence[Contender]
) -> dict[str, int]:
    """Bytes that a token adds to the key-value cache of one sequence, read off a real cache."""
    tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    held = {}
    for contender in models:
        cache = DynamicCache(config=find_decoder(model).config)
        with _eval_mode(model), choose_streams(layer, contender.streams):
            model(input_ids=tokens, past_key_values=cache)
        layers = [x for x in cache.layers if getattr(x, "keys", None) is not None]
        held[contender.name] = sum(x.keys.nbytes + x.values.nbytes for x in layers) // 2
    return held
