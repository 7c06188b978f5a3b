"""The micro-batch that fits, found before a training starts by passes over whole rows of it.

It decides over memory, time and rounding: the batch stays as it is.

Dimensions: B rows of a micro-batch, S tokens of a row, P streams.
"""

import gc
import json
import math
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from recycle import world
from recycle.cost.capacity import Peak, capacity, held
from recycle.cost.shortage import advice, enough_memory, is_out_of_memory
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead
from recycle.parscale import checkpointing_arguments
from recycle.progress import Silent
from recycle.sharding import is_sharded

from .arguments import arithmetic
from .checkpoints import TrainingError
from .plan import TrainingPlan
from .shortage import in_training

USABLE = 0.9  # of a device's free memory
FIRST = 128  # tokens of the first pass: from each to the next, twice as long, is extrapolated
MOMENTS = 2 * 4  # bytes that AdamW adds to a parameter in its first step
BUCKETS = 4  # bytes that DDP adds to a parameter: its gradient once more
FITTED = "fitted.json"  # what was found, so that a training goes on with the same rounding


def fit(
    model: Any,
    plan: TrainingPlan,
    packed: bool,
    progress: Silent,
) -> TrainingPlan:
    """Settle the micro-batch of a plan that leaves it open (`auto`), and the streams held at once.

    Args:
        model: With what learns, on its device; gradients are cleared.
        plan: What the training is to do.
        packed: Whether a row may hold several texts.
        progress: Where what was found is said.

    Raises:
        TrainingError: One row with one stream at once does not fit.
    """
    settings, file = plan.settings, plan.folder / FITTED
    if settings.micro_batch_size != "auto":
        return plan
    under = [world.size(), str(settings.gradient_checkpointing), plan.at_once, _name(model.device)]
    known = world.once(lambda: json.loads(file.read_text()) if file.is_file() else {})
    if known.pop("under", None) == under:
        return _settled(plan, **known)
    progress.start(f"fitting {plan.adapter} into memory")
    streams, share = plan.at_once or plan.num_streams, plan.blocks_per_process
    least = _settled(plan, 1, plan.at_once)
    enough = enough_memory(
        TrainingError, f"fitting {plan.adapter!r}", lambda: in_training(least, model)
    )
    with enough, Trial(model, plan, packed) as trial:
        fewer = (2**k for k in reversed(range(streams.bit_length())) if 2**k < streams)
        at_once = next((k for k in (streams, *fewer) if trial.holds_row(k)), 0)
        size = trial.largest(share, at_once) if at_once == streams else 1
    settled = _settled(plan, size, at_once if at_once < plan.num_streams else None)
    if not at_once:
        raise TrainingError(
            f"{plan.adapter!r} does not fit into memory: a block of {plan.block_size} tokens takes "
            f"more than {USABLE:.0%} of the {trial.capacity / 2**30:.1f} GiB that are free. "
            + advice(in_training(replace(settled, at_once=1), model))
        )
    groups = f", {at_once} of {plan.num_streams} streams at once" if settled.at_once else ""
    progress.say(
        f"{plan.adapter}: micro-batches of {size} of {settings.batch_size} "
        f"block{'s' * (settings.batch_size > 1)} fit into memory{groups}"
    )
    found = {"size": size, "at_once": settled.at_once, "under": under}

    def write() -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found).encode())

    world.once(write)
    return settled


def _settled(plan: TrainingPlan, size: int, at_once: int | None) -> TrainingPlan:
    settings = plan.settings.model_copy(update={"micro_batch_size": size})
    return replace(plan, settings=settings, at_once=at_once)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Trial:
    """Forward and backward passes of a training, and the most memory that each would take in it.

    All processes run the same ones, and go by the one that takes the most.

    A context manager, which leaves the model without gradients.
    """

    def __init__(self, model: Any, plan: TrainingPlan, packed: bool) -> None:
        self.model, self.plan, self.packed = model, plan, packed
        self.device: torch.device = model.device
        self.capacity = min(world.gather(capacity(self.device)))
        self.before = max(world.gather(held(self.device)))
        learned = sum(x.numel() for x in model.parameters() if x.requires_grad)
        more = MOMENTS + BUCKETS * (world.size() > 1)
        self.limit = USABLE * self.capacity - more * learned

    def __enter__(self) -> Self:
        checkpointing = self.plan.settings.gradient_checkpointing
        if checkpointing:
            self.model.gradient_checkpointing_enable(checkpointing_arguments(checkpointing))
        self.model.train()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.model.zero_grad(set_to_none=True)
        if self.plan.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self._clear()

    def holds_row(self, at_once: int) -> bool:
        """Whether one row fits, with so many streams at once.

        Parts of it that are twice as long each time tell before a pass whether it may be tried.
        """
        tokens = min(FIRST, self.plan.block_size)
        while True:
            longer = min(2 * tokens, self.plan.block_size)
            growth = self.peak(1, tokens, at_once) - self.before
            if self.before + growth * longer / tokens > self.limit:
                return False
            if tokens == longer:
                return True
            tokens = longer

    def largest(self, share: int, at_once: int) -> int:
        """The most rows that fit, of which one does, and that divide a process's share of a batch.

        From one and a few rows it is extrapolated, and then tried.
        """
        sizes = [size for size in range(2, share + 1) if share % size == 0]
        tokens = self.plan.block_size
        one = self.peak(1, tokens, at_once)
        if not sizes or self.before + (one - self.before) * sizes[0] > self.limit:
            return 1
        few = self.peak(sizes[0], tokens, at_once)
        if few > self.limit:
            return 1
        row = max(few - one, 0) / (sizes[0] - 1)
        for size in reversed(sizes[1:]):
            expected = one + row * (size - 1)
            if expected <= self.limit and self.peak(size, tokens, at_once) <= self.limit:
                return size
        return sizes[0]

    def peak(self, rows: int, tokens: int, at_once: int) -> float:
        """Most bytes held in a forward and backward pass; infinite where memory was too small.

        Gradients stay, as they do from one micro-batch of a step to the next.
        """
        plan, active = self.plan, self.plan.active
        vocabulary = self.model.get_input_embeddings().num_embeddings
        places = torch.arange(tokens, device=self.device)
        inputs = {"input_ids": (places % vocabulary).repeat(rows, 1)}
        inputs["labels"] = inputs["input_ids"]
        if self.packed:
            inputs["position_ids"] = (places % math.ceil(tokens / 2)).repeat(rows, 1)
        if active is not None and plan.own_loss:
            active = replace(active, apart=True)
        groups = at_once if at_once < plan.num_streams else None
        self._clear()
        try:
            with (
                Peak(self.device) as peak,
                OutputHead(self.model, groups) as head,
                arithmetic(plan, self.device),
                world.own_random_state(self.device),
            ):
                head.log_probs(active, **inputs).sum().backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (world.size() > 1 and is_sharded(self.model)):
                raise  # of a sharded model: the others wait in the middle of a layer
            return max(world.gather(math.inf))
        return max(world.gather(float(peak.bytes)))

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
