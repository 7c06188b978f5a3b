"""Steps of a nested training beside the bare backbone's forward and backward, in turns.

The bare backbone runs the same stream-tokens: its decoder on P*B rows, the largest P, and its
output head on one row for each P and sequence, as streams are merged before the head. Its weights
are frozen, and gradients flow through the whole decoder back to the embedded tokens.

Dimensions: B sequences, S tokens of each, |P| values of P in one pass, D hidden size.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from recycle import results
from recycle.data import Document
from recycle.evaluate import OutputHead
from recycle.parscale import ActiveStreams
from recycle.progress import Silent
from recycle.recipe import Training
from recycle.train import StreamTrainer, TrainingPlan
from recycle.train.validation import Validation

ADAPTER = "default"
NEVER = 10**6  # steps
Pair = tuple[float, float]  # seconds: ours, and the bare backbone's


class Turns(StreamTrainer):
    """The trainer of a run; after each of its steps the bare backbone takes its turn.

    A step of ours is all that lies between two turns: batch, forward, backward, check, clip, AdamW,
    scheduler and record.
    """

    def __init__(self, bare: Callable[[], None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bare = bare
        self.pairs: list[Pair] = []
        self.ended = 0.0  # of the last turn of the bare backbone

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        ours = clock(self.model.device) - self.ended
        self.pairs.append((ours, seconds(self.bare, self.model.device)))
        self.ended = clock(self.model.device)
        super().on_step_begin(*arguments, **kwargs)


def whole_steps(
    ours: Any,
    bare: Callable[[], None],
    tokens: Tensor,
    p_values: Sequence[int],
    repeats: int,
    **settings: Any,
) -> list[Pair]:
    """Seconds of whole training steps on `tokens` [B, S], after a warm-up of two.

    Args:
        ours: The PEFT model. It learns meanwhile.
        bare: What the bare backbone runs.
        tokens: Text of every step.
        p_values: The values of P that are trained at once.
        repeats: Steps that count.
        settings: Of a recipe's `training`.
    """
    row = {"input_ids": tokens[0].tolist(), "labels": tokens[0].tolist()}
    size, steps = len(tokens), repeats + 3  # the first turn comes before any step of ours
    blocks = datasets.Dataset.from_list([row] * (size * steps))
    short = row["input_ids"][:8]
    with tempfile.TemporaryDirectory() as folder, OutputHead(ours) as head:
        plan = TrainingPlan(
            adapter=ADAPTER,
            rows=tuple(f"P = {p}" for p in p_values),
            p_values=tuple(p_values),
            steps=steps,
            block_size=tokens.shape[1],
            learning_rates={"prefix": 1e-3, "aggregator": 1e-4},
            settings=Training(
                batch_size=size,
                micro_batch_size=size,
                checkpoint_steps=NEVER,
                validation_steps=NEVER,
                **settings,
            ),
            log_steps=1,
            folder=Path(folder),
            dtype=str(ours.dtype).removeprefix("torch."),
        )
        validation = Validation(plan, [Document("text", "text", short, short, 8)], batch_size=1)
        trainer = Turns(bare, ours, plan, blocks, validation, head, Silent())
        try:
            trainer.train()
        finally:
            trainer.release()
        ours.zero_grad(set_to_none=True)
        return trainer.pairs[3:]


def forward_and_backward(
    head: OutputHead, tokens: Tensor, p_values: Sequence[int]
) -> Callable[[], None]:
    """Our forward and backward pass for the losses of these P at once."""
    active = ActiveStreams(ADAPTER, max(p_values), tuple(p_values))

    def run() -> None:
        (-head.log_probs(active, tokens, tokens).mean()).backward()

    return run


def bare_step(bare: PreTrainedModel, tokens: Tensor, p_values: Sequence[int]) -> Callable[[], None]:
    """The bare backbone's forward and backward at the same stream-tokens."""
    rows = tokens.repeat_interleave(max(p_values), dim=0)  # [B*P, S]
    labels = tokens[:, 1:].repeat(len(p_values), 1).flatten()

    def run() -> None:
        embedded = bare.get_input_embeddings()(rows).detach().requires_grad_()
        hidden = bare.get_decoder()(inputs_embeds=embedded, use_cache=False)[0]
        hidden = hidden.unflatten(0, (-1, max(p_values)))  # [B, P, S, D]
        merged = torch.cat([hidden[:, :p].mean(dim=1) for p in p_values])  # [|P|*B, S, D]
        logits = bare.get_output_embeddings()(merged)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), labels).backward()

    return run


def turns(steps: Sequence[Callable[[], None]], model: Any, repeats: int) -> list[list[float]]:
    """Seconds of each of these steps, in turns, the first ones first and last, after a warm-up."""
    found = []
    for repeat in range(-1, repeats):
        order = list(range(len(steps)))[:: -1 if repeat % 2 else 1]
        times = dict.fromkeys(order, 0.0)
        for i in order:
            model.zero_grad(set_to_none=True)
            times[i] = seconds(steps[i], model.device)
        found.append([times[i] for i in sorted(order)])
    model.zero_grad(set_to_none=True)
    return found[1:]


def seconds(step: Callable[[], None], device: torch.device) -> float:
    started = clock(device)
    step()
    return clock(device) - started


def clock(device: torch.device) -> float:
    """Seconds, after all that the device had to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def hardware(device: str) -> str:
    """What the steps ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = results.hardware()
    return f"{machine.cpu}, {torch.get_num_threads()} of {machine.cores} cores"
