"""TRL's trainer over streams: one pass of the decoder serves every P of a nested family.

Dimensions: B blocks of a micro-batch, S tokens of a block, |P| values of P.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from recycle.data import Splits
from recycle.evaluate.losses import contenders, document_losses, range_advice
from recycle.parscale.initialise import streams_of
from recycle.parscale.prefix import ActiveStreams
from recycle.parscale.streams import choose_streams
from recycle.progress import Silent
from recycle.recipe import Recipe

from .checkpoints import TrainingError, seal, writing
from .head import fused_head_is_right, next_token_log_probs
from .jobs import Job, steps

MEND = (
    "The last good checkpoint is kept. Lower training.prefix_learning_rate, "
    "training.control_learning_rate or training.aggregator_learning_rate and name a new "
    "output.dir=FOLDER."
)
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StreamTrainer(SFTTrainer):
    """TRL's trainer with the loss of every P, whose outputs come stacked out of one pass."""

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
        self.seconds = 0.0  # in optimiser steps, of this and earlier processes
        self.elapsed = 0.0  # the same with validation and checkpoints
        self.weights = torch.tensor([training.loss_weights.get(p, 1.0) for p in job.p_values])
        self.weights /= self.weights.sum()
        self.head_losses: list[Tensor] = []
        self.layer = streams_of(model)
        self.mend = range_advice(model) + MEND
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
        # Gradients of a mean over a step's tokens are too small for float16. There the backward
        # pass is that of their sum, and what reaches the parameters, in float32, is divided again.
        self.summed = training.batch_size * (recipe.data.block_size - 1)
        self.in_float16 = model.dtype == torch.float16
        self.hooks = [
            parameter.register_hook(lambda gradient: gradient / self.summed)
            for parameter in (*prefixes, *aggregators)
            if self.in_float16 and parameter.requires_grad
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        values = [(p, p.data) for p in (*prefixes, *aggregators)]
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=splits.train,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=[_Watch(self, splits, recipe, progress)],
        )
        self.pop_callback(PrinterCallback)
        # Every micro-batch has the same number of predicted tokens, so the mean over micro-batches
        # is the mean over tokens, and Trainer divides by the number of micro-batches itself.
        self.model_accepts_loss_kwargs = False
        for parameter, value in values:  # which TRL rounds to bfloat16 on a quantised backbone
            parameter.data = value
        self.fused = fused_head_is_right(model, self.layer, splits.train[0]["input_ids"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean over the P of the loss in nats per token."""
        p_values = self.job.p_values
        streams = ActiveStreams(self.job.adapter, p_values[-1], p_values)
        labels = inputs["labels"].repeat(len(p_values), 1)  # [|P|*B, S]
        ids = {"input_ids": inputs["input_ids"], "use_cache": False}
        with choose_streams(self.layer, streams):
            if self.fused:
                log_probs = model(**ids, labels=labels, fused_lm_head=True).log_probs.float()
            else:
                log_probs = next_token_log_probs(model(**ids).logits, labels)
        losses = -log_probs.view(len(p_values), -1).mean(dim=1)  # [|P|]
        if not torch.isfinite(losses).all():
            raise TrainingError(
                f"The training loss of adapter {self.job.adapter!r} is not finite at step "
                f"{self.state.global_step + 1}: {losses.tolist()} for P = {list(p_values)}. "
                f"{self.mend}"
            )
        self.head_losses.append(losses.detach())
        loss = (losses * self.weights.to(losses)).sum()
        if self.in_float16:
            loss.register_hook(lambda gradient: gradient * self.summed)
        return loss

    def release(self) -> None:
        """Take TRL's forward off the backbone again, and the hooks off the adapter."""
        for hook in self.hooks:
            hook.remove()
        self.model.get_base_model().__dict__.pop("forward", None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in self.model.named_parameters():
            if _is_of(self.job.adapter, name) and not torch.isfinite(parameter).all():
                raise TrainingError(f"{name} is not finite at a checkpoint. {self.mend}")
        # TRL's version writes a model card as well.
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(checkpoint):
                super(SFTTrainer, self)._save_checkpoint(model, trial)
                seal(checkpoint)
        except TrainingError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # TRL's version adds metrics of its own loss.
        super(SFTTrainer, self).log(logs, start_time)


class _Watch(TrainerCallback):
    """Checks gradients, measures the validation loss, and moves the progress bar."""

    def __init__(
        self, trainer: StreamTrainer, splits: Splits, recipe: Recipe, progress: Silent
    ) -> None:
        self.trainer = trainer
        self.splits = splits
        self.recipe = recipe
        self.progress = progress
        self.started = self.begun = 0.0
        self.tokens_per_step = recipe.training.batch_size * recipe.data.block_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.start(self.trainer.job.adapter, state.max_steps * self.tokens_per_step)
        self.progress.advance(state.global_step * self.tokens_per_step)
        earlier = [entry for entry in state.log_history if "seconds" in entry]
        if earlier:
            self.trainer.seconds = earlier[-1]["seconds"]
            self.trainer.elapsed = earlier[-1]["elapsed"]
        self.begun = time.perf_counter() - self.trainer.elapsed
        if state.global_step == 0:
            self._validate(state)
        else:
            self.progress.say(
                f"{self.trainer.job.adapter}: goes on from a checkpoint at "
                f"{state.global_step * self.tokens_per_step:,} tokens"
            )

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
                    f"The gradient of {name} is {what} at step {state.global_step + 1}. A missing "
                    "one means that the backbone's kernels pass none on, a non-finite one that a "
                    f"learning rate is too high. {self.trainer.mend}"
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
        self.trainer.elapsed = time.perf_counter() - self.begun
        state.log_history.append(
            {
                "step": state.global_step,
                "seconds": self.trainer.seconds,
                "elapsed": self.trainer.elapsed,
            }
        )

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
                f"The validation loss is not finite at step {state.global_step}: {means}. "
                f"{self.trainer.mend}"
            )
        tokens = state.global_step * self.tokens_per_step
        point = {"step": state.global_step, "tokens": tokens, "validation_loss": means}
        state.log_history.append({"step": state.global_step, "curve": point})
        self.progress.say(
            f"{self.trainer.job.adapter}: {tokens:,} tokens, validation loss "
            + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        )


def _is_of(adapter: str, parameter: str) -> bool:
    return "parscale_" in parameter and adapter in parameter.split(".")
