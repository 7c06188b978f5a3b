"""transformers' Trainer over streams: one pass of the decoder serves every P of a nested family.

Dimensions: B blocks of a micro-batch, S tokens of a block, |P| values of P.
"""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from recycle.data import IGNORED, Document
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead, document_losses, passes_of, range_advice
from recycle.parscale import ActiveStreams, adapter_parameters
from recycle.progress import Silent
from recycle.results import CurvePoint, LossPoint, TrainingRecord

from .checkpoints import RECORD, TrainingError, seal, writing
from .plan import TrainingPlan

ADVICE = (
    "The last good checkpoint is kept. Lower training.prefix_learning_rate, "
    "training.control_learning_rate or training.aggregator_learning_rate, and start in a new "
    "folder with output.dir=FOLDER."
)
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StreamTrainer(Trainer, TrainerCallback):
    """Trainer with the loss of every P, whose hidden states come stacked out of one pass.

    As its own callback it measures the validation loss, moves the display and keeps `record`: what
    is known of the training so far, which goes into every checkpoint.
    """

    def __init__(
        self,
        model: PeftModelForCausalLM,
        plan: TrainingPlan,
        blocks: datasets.Dataset,
        validation: Sequence[Document],
        batch_size: int,
        head: OutputHead,
        progress: Silent,
    ) -> None:
        self.plan = plan
        self.head = head
        self.validation = validation
        self.batch_size = batch_size
        self.progress = progress
        self.started = self.begun = 0.0
        self.seconds = 0.0  # in optimiser steps, of this and earlier processes
        self.record = first_record(plan)
        self.active = ActiveStreams(plan.adapter, plan.num_streams, plan.p_values)
        weights = torch.tensor([plan.settings.loss_weights.get(p, 1.0) for p in plan.p_values])
        self.weights = (weights / weights.sum()).to(model.device)  # [|P|]
        self.losses: list[Tensor] = []  # [|P|] of each micro-batch; they add up to the step's
        self.advice = range_advice(model) + ADVICE
        self.learned = adapter_parameters(model, plan.adapter)
        rates = plan.learning_rates
        groups = [
            {"params": [x.parameter for x in self.learned if x.group == group], "lr": rates[group]}
            for group in rates
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        # Gradients of a mean over a step's tokens are too small for float16. There the backward
        # pass is that of their sum, and what reaches the parameters, in float32, is divided again.
        self.in_float16 = model.dtype == torch.float16
        self.predicted: Tensor | int = 1  # labels in the step
        self.hooks = [
            x.parameter.register_hook(lambda gradient: gradient / self.predicted)
            for x in self.learned
            if self.in_float16 and x.parameter.requires_grad
        ]
        super().__init__(
            model=model,
            args=_arguments(plan, model.device),
            train_dataset=blocks,
            data_collator=_collate,
            optimizers=(optimizer, None),
            callbacks=[self],
        )
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the labels of the step

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss: the weighted mean over P, in nats per token.

        Args:
            model: The PEFT model.
            inputs: `input_ids` and `labels`, `[B, S]`.
            return_outputs: Not used.
            num_items_in_batch: Labels in the step, over all of its micro-batches.
        """
        assert num_items_in_batch is not None
        self.predicted = num_items_in_batch
        log_probs = self.head.log_probs(self.active, inputs["input_ids"], inputs["labels"])
        losses = -log_probs.sum(dim=(1, 2)) / num_items_in_batch  # [|P|]
        self.losses.append(losses.detach())
        loss = (losses * self.weights).sum()
        if self.in_float16:
            loss.register_hook(lambda gradient: gradient * self.predicted)
        return loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward of a micro-batch; the last one of a step is followed by a check."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._check(self.state.global_step + 1)
        return loss

    def _check(self, step: int) -> None:
        """Stop before an update with a loss or a gradient that is missing or not finite."""
        for x in self.learned:
            if x.parameter.grad is None:
                raise TrainingError(
                    f"The gradient of {x.name} is missing at step {step}: the backbone's kernels "
                    f"pass none on. {self.advice}"
                )
        gradients = [x.parameter.grad for x in self.learned if x.parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        losses = torch.stack(self.losses).sum(dim=0)
        self.losses.clear()
        *self.step_losses, total = torch.cat([losses, norm.view(1)]).tolist()  # waits for the GPU
        if not all(map(math.isfinite, self.step_losses)):
            raise TrainingError(
                f"The training loss of adapter {self.plan.adapter!r} is not finite at step {step}: "
                f"{self.step_losses} for P = {list(self.plan.p_values)}. {self.advice}"
            )
        if not math.isfinite(total):
            finite = [bool(torch.isfinite(gradient).all()) for gradient in gradients]
            name = self.learned[finite.index(False)].name
            raise TrainingError(
                f"The gradient of {name} is not finite at step {step}: a learning rate is too "
                f"high. {self.advice}"
            )

    def release(self) -> None:
        """Take the hooks off the adapter."""
        for hook in self.hooks:
            hook.remove()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for x in self.learned:
            if not torch.isfinite(x.parameter).all():
                raise TrainingError(f"{x.name} is not finite at a checkpoint. {self.advice}")
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                write_atomically(checkpoint / RECORD, self.record.model_dump_json().encode())
                seal(checkpoint)
        except TrainingError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        plan = self.plan
        if state.global_step:
            checkpoint = plan.folder / f"checkpoint-{state.global_step}"
            record = TrainingRecord.model_validate_json((checkpoint / RECORD).read_text())
            self.seconds = record.tokens / record.tokens_per_second  # type: ignore[operator]
            self.record = record
        self.progress.start(f"training {plan.adapter}", plan.tokens, self.record.tokens)
        self.begun = time.perf_counter() - self.record.wall_seconds
        if not state.global_step:
            self._validate(state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        plan, step = self.plan, state.global_step
        self.seconds += time.perf_counter() - self.started
        weighted = zip(self.weights.tolist(), self.step_losses, strict=True)
        loss = sum(weight * loss for weight, loss in weighted)
        tokens = step * plan.tokens_per_step
        found: dict[str, Any] = {
            "tokens": tokens,
            "steps": step,
            "tokens_per_second": tokens / self.seconds,
            "stream_tokens_per_second": tokens * plan.num_streams / self.seconds,
        }
        if step % plan.log_steps == 0 or step == plan.steps:
            point = LossPoint(step=step, tokens=tokens, loss=loss)
            found["train_loss"] = (*self.record.train_loss, point)
        self.record = self.record.model_copy(update=found)
        self.progress.advance(plan.tokens_per_step, loss)
        if step == plan.steps or step % plan.settings.validation_steps == 0:
            self._validate(state)
        elapsed = {"wall_seconds": time.perf_counter() - self.begun}
        self.record = self.record.model_copy(update=elapsed)

    def _validate(self, state: TrainerState) -> None:
        model, adapter = self.head.model, self.plan.adapter
        model.eval()
        passes = passes_of(model, adapter)
        losses = document_losses(self.head, passes, self.validation, self.batch_size)
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        if not all(map(math.isfinite, means.values())):
            raise TrainingError(
                f"The validation loss is not finite at step {state.global_step}: {means}. "
                f"{self.advice}"
            )
        tokens = state.global_step * self.plan.tokens_per_step
        point = CurvePoint(step=state.global_step, tokens=tokens, validation_loss=means)
        curve = (*self.record.curve, point)
        self.record = self.record.model_copy(update={"curve": curve})
        self.progress.say(
            f"{adapter}: {tokens:,} tokens, validation loss "
            + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        )


def first_record(plan: TrainingPlan) -> TrainingRecord:
    """The record of a training before its first step."""
    return TrainingRecord(
        name=plan.adapter, p_values=plan.p_values, tokens=0, steps=0, wall_seconds=0
    )


def _arguments(plan: TrainingPlan, device: torch.device) -> TrainingArguments:
    settings = plan.settings
    return TrainingArguments(
        output_dir=str(plan.folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        lr_scheduler_type=SCHEDULES[settings.decay],
        # The first step of a warm-up has a rate of zero: it must not be the only one.
        warmup_steps=min(math.ceil(settings.warmup * plan.steps), plan.steps - 1),
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        seed=settings.seed,
        bf16=False,  # the backbone's own dtype decides; adapters stay in float32
        fp16=False,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`input_ids` and `labels`, `[B, S]`; nothing predicts the first token."""
    ids, labels = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "labels": labels}
