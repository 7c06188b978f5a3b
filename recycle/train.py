"""TRL's trainer over streams: one pass of the decoder serves every P of a nested family.

Dimensions: B blocks of a micro-batch, S tokens of a block, |P| heads.
"""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from .data import Splits
from .evaluate import contenders, document_losses, streams_of
from .parscale import ParScaleConfig
from .parscale.folder import CONTROL, NESTED, file_sha256
from .parscale.prefix import ActiveStreams
from .parscale.streams import choose_streams
from .progress import Silent
from .recipe import Recipe
from .results import CurvePoint, LossPoint, Training, write_atomically

COMPLETE = "complete"  # written into a checkpoint last, with the hashes of the files before it
RECORD = "training.json"  # written when an adapter's training is finished
WEIGHTS = "trained.safetensors"
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Job:
    """One training run: an adapter, the values of P it learns at once, and its learning rate for
    prefixes.
    """

    adapter: str
    heads: tuple[int, ...]
    prefix_learning_rate: float


def jobs(recipe: Recipe) -> list[Job]:
    """The adapters that a recipe trains, one after the other; the control comes last."""
    rate = recipe.training.prefix_learning_rate
    if recipe.method.nested:
        found = [Job(NESTED, recipe.streams, rate)]
    else:
        found = [Job(f"p{p}", (p,), rate) for p in recipe.streams]
    if recipe.training.control:
        found.append(Job(CONTROL, (1,), recipe.training.control_learning_rate))
    return found


def steps(recipe: Recipe) -> int:
    """Optimiser steps that meet the token budget to within one step; a budget above zero gets at
    least one.
    """
    per_step = recipe.training.batch_size * recipe.data.block_size
    return max(recipe.training.tokens // per_step, int(recipe.training.tokens > 0))


def add_adapter(model: Any, job: Job, recipe: Recipe, starts: Tensor) -> PeftModelForCausalLM:
    """Add a job's untrained adapter to a backbone or to the PEFT model it has become, and make it
    the active one.

    Args:
        starts: `[streams, n]` token ids of the texts that streams start from; a job takes the
            first of them.
    """
    torch.manual_seed(recipe.training.seed)
    p = job.heads[-1]
    text = recipe.method.init == "text"
    config = ParScaleConfig(
        num_streams=p,
        heads=list(job.heads),
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        smoothing=recipe.method.smoothing,
        init=recipe.method.init,
        start_token_ids=starts[:p].tolist() if text else None,
        backbone_dtype=recipe.backbone.quantization or str(model.dtype).removeprefix("torch."),
    )
    if isinstance(model, PeftModelForCausalLM):
        model.add_adapter(job.adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=job.adapter)
    model.set_adapter(job.adapter)
    return model


@dataclass(frozen=True)
class Estimate:
    """What a run is going to take."""

    seconds: float
    gib: float


def estimate(model: PeftModelForCausalLM, recipe: Recipe) -> Estimate:
    """Expected time and memory of a recipe's training and comparison, from a short step with the
    first adapter.
    """
    layer = streams_of(model)
    job = jobs(recipe)[0]
    p = job.heads[-1]
    device = next(model.parameters()).device
    block = recipe.data.block_size
    length = min(block, 128)
    tokens = torch.arange(length, device=device).unsqueeze(0)
    before = _memory(device)

    def seconds_per_stream_token(backward: bool) -> float:
        started = time.perf_counter()
        with choose_streams(layer, ActiveStreams(job.adapter, p, job.heads)):
            labels = tokens.repeat(len(job.heads), 1)
            with torch.set_grad_enabled(backward):
                loss = F.cross_entropy(
                    model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float(),
                    labels.flatten(),
                )
            loss.backward() if backward else loss.item()
        return (time.perf_counter() - started) / (length * p)

    seconds_per_stream_token(True)  # the first pass also sets kernels up
    learning = min(seconds_per_stream_token(True) for _ in range(2))
    reading = min(seconds_per_stream_token(False) for _ in range(2))
    model.zero_grad(set_to_none=True)

    training, data = recipe.training, recipe.data
    text = steps(recipe) * training.batch_size * block
    points = 2 + steps(recipe) // training.validation_steps if text else 0
    streams = sum(job.heads[-1] for job in jobs(recipe))
    read = block * (
        streams * points * data.validation_documents + (streams + 1) * data.test_documents
    )
    adapter = sum(x.numel() for x in model.parameters() if x.requires_grad)
    micro_batches = training.micro_batch_size * block / length
    logits = (
        recipe.evaluation.batch_size
        * len(job.heads)
        * block
        * model.config.get_text_config().vocab_size
    )
    growth = max((_memory(device) - before) * micro_batches, logits * model.dtype.itemsize)
    return Estimate(
        seconds=text * streams * learning + read * reading,
        gib=(before + growth + 3 * 4 * adapter) / 2**30,  # gradient and AdamW's two moments
    )


def _memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(
    model: PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    splits: Splits,
    recipe: Recipe,
    folder: Path,
    progress: Silent,
) -> Training:
    """Train one adapter on the blocks of `splits.train`, going on from the last good checkpoint in
    `folder`.

    Returns:
        The record of the training. The adapter in `model` holds the trained values, also where an
        earlier call had finished the training already.

    Raises:
        TrainingError: A loss or a prefix's gradient is missing or not finite.
    """
    if (folder / RECORD).is_file():
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=job.adapter)
        return Training.model_validate_json((folder / RECORD).read_text())
    total = steps(recipe)
    tokens = total * recipe.training.batch_size * recipe.data.block_size
    log: list[dict[str, Any]] = []
    seconds = 0.0
    if total:
        trainer = StreamTrainer(model, tokenizer, job, splits, recipe, folder, progress)
        checkpoint = last_checkpoint(folder)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.release()
        log, seconds = trainer.state.log_history, trainer.seconds
    record = Training(
        name=job.adapter,
        streams=job.heads,
        tokens=tokens,
        steps=total,
        wall_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else None,
        stream_tokens_per_second=tokens * job.heads[-1] / seconds if seconds else None,
        curve=tuple(CurvePoint.model_validate(x["curve"]) for x in log if "curve" in x),
        train_loss=tuple(LossPoint.model_validate(x["train"]) for x in log if "train" in x),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / WEIGHTS):
        save_file(_adapter_state(model, job.adapter), folder / WEIGHTS)
        write_atomically(folder / RECORD, record.model_dump_json().encode())
    for unneeded in folder.glob("checkpoint-*"):
        shutil.rmtree(unneeded)
    return record


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; torn ones after it are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found and not _is_whole(found[-1]):
        shutil.rmtree(found.pop())
    return found[-1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    seal = checkpoint / COMPLETE
    return seal.is_file() and seal.read_bytes() == _seal(checkpoint)


def _seal(checkpoint: Path) -> bytes:
    """SHA-256 of every file of a checkpoint but the seal itself."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]
    hashes = {path.relative_to(checkpoint).as_posix(): file_sha256(path) for path in files}
    return json.dumps(hashes, sort_keys=True).encode()


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Give what cannot be written one exception; torch and safetensors each have their own.

    Raises:
        TrainingError: In the place of theirs, of which a full disk is the usual cause.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{what} could not be written: {str(error).splitlines()[0]}. The last good "
            "checkpoint is kept. Make room on that disk, then give the same command again."
        ) from error


def _is_of(adapter: str, parameter: str) -> bool:
    return "parscale_" in parameter and adapter in parameter.split(".")


def _adapter_state(model: PeftModelForCausalLM, adapter: str) -> dict[str, Tensor]:
    # Told nothing about embeddings, PEFT looks for the backbone's config on the Hub.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}


class StreamTrainer(SFTTrainer):
    """TRL's trainer with the loss of every head: the heads' outputs come stacked out of one pass
    of the decoder.
    """

    def __init__(
        self,
        model: PeftModelForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        job: Job,
        splits: Splits,
        recipe: Recipe,
        folder: Path,
        progress: Silent,
    ) -> None:
        training = recipe.training
        self.job = job
        self.seconds = 0.0  # in optimiser steps, without validation
        self.weights = torch.tensor([training.loss_weights.get(p, 1.0) for p in job.heads])
        self.weights /= self.weights.sum()
        self.head_losses: list[Tensor] = []
        self.layer = streams_of(model)
        total = steps(recipe)
        arguments = SFTConfig(
            output_dir=str(folder),
            max_steps=total,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.batch_size // training.micro_batch_size,
            lr_scheduler_type=SCHEDULES[training.decay],
            warmup_steps=math.ceil(training.warmup * total),
            max_grad_norm=training.max_grad_norm,
            gradient_checkpointing=training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_steps=training.checkpoint_steps,
            save_total_limit=2,
            logging_steps=recipe.logging.steps,
            seed=training.seed,
            bf16=False,  # the backbone's own dtype decides; adapters stay in float32
            fp16=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
        )
        prefixes: list[nn.Parameter] = []
        aggregators: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if _is_of(job.adapter, name):
                (aggregators if "aggregator" in name else prefixes).append(parameter)
        groups = [
            {"params": prefixes, "lr": job.prefix_learning_rate},
            {"params": aggregators, "lr": training.aggregator_learning_rate},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=splits.train,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=[_Watch(self, splits, recipe, progress)],
        )
        self.pop_callback(_printer())
        # Every micro-batch has the same number of predicted tokens, so the mean over micro-batches
        # is the mean over
        # tokens, and Trainer divides by the number of micro-batches itself.
        self.model_accepts_loss_kwargs = False
        wrong = [
            n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32
        ]
        if wrong:
            raise TrainingError(f"Adapters train in float32; {wrong[0]} was cast by the trainer.")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean over the heads of the loss in nats per token."""
        heads = self.job.heads
        streams = ActiveStreams(self.job.adapter, heads[-1], heads)
        labels = inputs["labels"].repeat(len(heads), 1)  # [|P|*B, S]
        with choose_streams(self.layer, streams):
            outputs = model(
                input_ids=inputs["input_ids"], labels=labels, use_cache=False, fused_lm_head=True
            )
        tokens = outputs.label_mask.sum() / len(heads)
        losses = -outputs.log_probs.float().view(len(heads), -1).sum(dim=1) / tokens  # [|P|]
        if not torch.isfinite(losses).all():
            raise TrainingError(
                f"The training loss of adapter {self.job.adapter!r} is not finite at step "
                f"{self.state.global_step + 1}: {losses.tolist()} for P = {list(heads)}. The "
                f"last good checkpoint is "
                "kept. Lower training.prefix_learning_rate or training.aggregator_learning_rate."
            )
        self.head_losses.append(losses.detach())
        return (losses * self.weights.to(losses)).sum()

    def release(self) -> None:
        """Take TRL's forward off the backbone again."""
        self.model.get_base_model().__dict__.pop("forward", None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # TRL's version writes a model card as well.
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(checkpoint):
                super(SFTTrainer, self)._save_checkpoint(model, trial)
                write_atomically(checkpoint / COMPLETE, _seal(checkpoint))
        except TrainingError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # TRL's version adds metrics of its own loss.
        super(SFTTrainer, self).log(logs, start_time)


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class _Watch(TrainerCallback):
    """Checks gradients, measures the validation loss, and moves the progress bar."""

    def __init__(
        self, trainer: StreamTrainer, splits: Splits, recipe: Recipe, progress: Silent
    ) -> None:
        self.trainer = trainer
        self.splits = splits
        self.recipe = recipe
        self.progress = progress
        self.started = 0.0
        self.tokens_per_step = recipe.training.batch_size * recipe.data.block_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.start(self.trainer.job.adapter, state.max_steps * self.tokens_per_step)
        self.progress.advance(state.global_step * self.tokens_per_step)
        earlier = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.trainer.seconds = earlier[-1] if earlier else 0.0
        if state.global_step == 0:
            self._validate(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in self.trainer.model.named_parameters():
            if not _is_of(self.trainer.job.adapter, name):
                continue
            gradient = parameter.grad
            if gradient is None or not torch.isfinite(gradient).all():
                what = "missing" if gradient is None else "not finite"
                raise TrainingError(
                    f"The gradient of {name} is {what} at step {state.global_step + 1}. The "
                    f"last good checkpoint is kept. "
                    "A missing gradient means that the backbone's kernels pass none on; a "
                    "non-finite one that a learning "
                    "rate is too high."
                )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = torch.stack(self.trainer.head_losses).mean(dim=0)
        self.trainer.head_losses.clear()
        self.trainer.seconds += time.perf_counter() - self.started
        mean = (losses * self.trainer.weights.to(losses)).sum().item()
        tokens = state.global_step * self.tokens_per_step
        if state.global_step % args.logging_steps == 0 or state.global_step == state.max_steps:
            state.log_history.append(
                {
                    "step": state.global_step,
                    "train": {"step": state.global_step, "tokens": tokens, "loss": mean},
                }
            )
        self.progress.advance(self.tokens_per_step, mean)
        last = state.global_step == state.max_steps
        if last or state.global_step % self.recipe.training.validation_steps == 0:
            self._validate(state)
        state.log_history.append({"step": state.global_step, "seconds": self.trainer.seconds})

    def _validate(self, state: TrainerState) -> None:
        models = [
            contender
            for contender in contenders(self.trainer.layer)
            if contender.streams and contender.streams.adapter == self.trainer.job.adapter
        ]
        losses = document_losses(
            self.trainer.model,
            self.trainer.layer,
            models,
            self.splits.validation,
            self.recipe.evaluation.batch_size,
        )
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        if not all(math.isfinite(mean) for mean in means.values()):
            raise TrainingError(
                f"The validation loss is not finite at step {state.global_step}: {means}. The "
                f"last good checkpoint is "
                "kept. Lower the learning rates."
            )
        tokens = state.global_step * self.tokens_per_step
        point = {"step": state.global_step, "tokens": tokens, "validation_loss": means}
        state.log_history.append({"step": state.global_step, "curve": point})
        self.progress.say(
            f"{self.trainer.job.adapter}: {tokens:,} tokens, validation loss "
            + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        )
