"""transformers' Trainer over streams: one pass of the decoder serves every P of a nested family.

Dimensions: B blocks of a micro-batch, S tokens of a block, |P| values of P.
"""

import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from recycle import preemption, world
from recycle.disk import write_atomically
from recycle.evaluate import OutputHead, range_advice
from recycle.parscale import checkpointing_arguments
from recycle.progress import Silent
from recycle.results import CurvePoint, LossPoint, TrainingRecord
from recycle.sharding import average_gradients, is_sharded, share_start

from . import tracking
from .arguments import arithmetic, collate, trainer_arguments
from .checkpoints import RECORD, TrainingError, seal, writing
from .compilation import CompiledLayers
from .learned import learned_parameters, load_learned, save_learned
from .packing import one_text_a_row
from .plan import TrainingPlan, advice, first_record
from .validation import Validation

LEARNED = "learned.safetensors"
BEST = "best-{}.safetensors"  # what had been learned at a step, until a later one is better


class StreamTrainer(Trainer, TrainerCallback):
    """Trainer with the loss of every P, whose hidden states come stacked out of one pass.

    As its own callback it measures the validation loss, moves the display and keeps `record`: what
    is known of the training so far, which goes into every checkpoint.
    """

    def __init__(
        self,
        model: Any,
        plan: TrainingPlan,
        blocks: datasets.Dataset,
        validation: Validation,
        head: OutputHead,
        progress: Silent,
    ) -> None:
        self.plan = plan
        self.head = head
        self.validation = validation
        self.progress = progress
        self.started = self.begun = 0.0
        self.seconds = 0.0  # in optimiser steps, of this and earlier processes
        self.record = first_record(plan)
        self.stopped = False  # by SIGTERM
        weights = torch.tensor([plan.loss_weights.get(p, 1.0) for p in plan.p_values])
        self.weights = (weights / weights.sum()).to(model.device)  # [|P|]
        self.shares: list[float] = self.weights.tolist()
        self.losses: list[Tensor] = []  # [|P|] of each micro-batch; they add up to the step's
        rates = plan.learning_rates
        self.advice = range_advice(model) + advice(plan)
        self.learned = learned_parameters(model, plan)
        of = {group: [x.parameter for x in self.learned if x.group == group] for group in rates}
        self.groups = {group: parameters for group, parameters in of.items() if parameters}
        options = [{"params": self.groups[group], "lr": rates[group]} for group in self.groups]
        optimizer = torch.optim.AdamW(options, weight_decay=0.0, fused=True)
        self.tracked: dict[str, float] = {}  # of the step so far
        # Gradients of a mean over a step's tokens are too small for float16. There the backward
        # pass is that of their sum, and what reaches the parameters, in float32, is divided again.
        self.in_float16 = model.dtype == torch.float16
        self.layers = CompiledLayers(model) if plan.settings.compile else nullcontext()
        self.predicted: Tensor | int = 1  # labels in the step
        self.hooks = [
            x.parameter.register_hook(lambda gradient: gradient / self.predicted)
            for x in self.learned
            if self.in_float16 and x.parameter.requires_grad
        ]
        super().__init__(
            model=model,
            args=trainer_arguments(plan, model.device),
            train_dataset=blocks,
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[*tracking.trackers(plan.tracking), self],
        )
        self.pop_callback(PrinterCallback)
        self.sharded = is_sharded(model)
        if self.sharded:
            share_start([x.parameter for x in self.learned])
            model._is_accelerate_prepared = True  # it takes no DDP around it
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
            inputs: `input_ids`, `labels` and perhaps `position_ids`, `[B, S]`.
            return_outputs: Not used.
            num_items_in_batch: Labels in the step, over all of its micro-batches.
        """
        assert num_items_in_batch is not None
        self.predicted = num_items_in_batch
        active, own = self.plan.active, self.plan.own_loss
        if active is not None and own:
            active = replace(active, apart=True)
        with arithmetic(self.plan, self.model.device):
            log_probs = self.head.log_probs(active, **inputs, through=model)
        each = -log_probs.sum(dim=(1, 2)) / num_items_in_batch  # [|P|], then [P] of streams alone
        losses, alone = each.tensor_split([len(self.plan.p_values)])
        self.losses.append(losses.detach())
        loss = (losses * self.weights).sum()
        if own:
            loss = (1 - own) * loss + own * alone.mean()
        if self.in_float16:
            loss.register_hook(lambda gradient: gradient * self.predicted)
        return loss * world.size()  # gradients are averaged over the processes, this is their sum

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Forward and backward of a micro-batch; the last one of a step is followed by a check."""
        rows = nullcontext() if "position_ids" in inputs else one_text_a_row()
        with self.layers, rows:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            if self.sharded:
                average_gradients([x.parameter for x in self.learned])
            self._check(self.state.global_step + 1)
        return loss

    def _count_operations(self) -> float:
        """Floating-point operations of a row's forward and backward pass, for each token.

        In a pass of its own: counting chooses other kernels, which round in another way.
        """
        model: Any = self.model.train()
        inputs = self._prepare_inputs(collate([self.train_dataset[0]]))
        random_state = world.own_random_state(self.model.device)
        with random_state, FlopCounterMode(display=False) as counter:
            self.compute_loss(model, inputs, num_items_in_batch=1).backward()
        model.zero_grad(set_to_none=True)
        self.losses.clear()
        return float(counter.get_total_flops() / inputs["input_ids"].numel())

    def _check(self, step: int) -> None:
        """Stop before an update with a loss or a gradient that is missing or not finite."""
        for x in self.learned:
            # Of other weights some need not be in a pass: experts, parts for images.
            if x.parameter.grad is None and x.group in ("prefix", "aggregator"):
                raise TrainingError(
                    f"The gradient of {x.name} is missing at step {step}: the backbone's kernels "
                    f"pass none on. {self.advice}"
                )
        norms = tracking.gradient_norms(self.groups.values())
        losses = torch.stack(self.losses).sum(dim=0)
        self.losses.clear()
        asked = losses.new_full((1,), preemption.asked())
        shared = world.add_up(torch.cat([losses, asked]))  # the gradients are added up already
        predicted = torch.as_tensor(self.predicted, dtype=losses.dtype, device=losses.device)
        # The one place of a step where the host waits for the GPU.
        found = torch.cat([predicted.view(1), shared, norms]).tolist()
        self.learned_tokens, *self.step_losses, asked = found[: len(shared) + 1]
        self.norms = dict(zip(self.groups, found[len(shared) + 1 :], strict=True))
        self.stopped = asked > 0
        if not all(map(math.isfinite, self.step_losses)):
            raise TrainingError(
                f"The training loss of {self.plan.adapter!r} is not finite at step {step}: "
                f"{self.step_losses} for P = {list(self.plan.p_values)}. {self.advice}"
            )
        if not all(map(math.isfinite, self.norms.values())):
            name = next(
                x.name
                for x in self.learned
                if x.parameter.grad is not None and not torch.isfinite(x.parameter.grad).all()
            )
            raise TrainingError(
                f"The gradient of {name} is not finite at step {step}: a learning rate is too "
                f"high. {self.advice}"
            )

    def release(self) -> None:
        """Take the hooks off the adapter, and let go of the model: a callback holds its trainer."""
        for hook in self.hooks:
            hook.remove()
        if isinstance(self.layers, CompiledLayers):
            self.layers.release()
        self.callback_handler.callbacks.clear()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.plan.in_order:
            return SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for x in self.learned:
            if not torch.isfinite(x.parameter).all():
                raise TrainingError(f"{x.name} is not finite at a checkpoint. {self.advice}")
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
                world.gather(None)  # each process has written its part
                world.once(lambda: self._seal(checkpoint))
        except TrainingError:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _seal(self, checkpoint: Path) -> None:
        write_atomically(checkpoint / RECORD, self.record.model_dump_json().encode())
        seal(checkpoint)
        kept = BEST.format(self.record.kept_step)
        for best in self.plan.folder.glob(BEST.format("*")):
            if best.name != kept:  # no checkpoint goes back to before it
                best.unlink()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # of several processes, the first
            save_learned(self.learned, Path(str(output_dir)) / LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_learned(self.learned, Path(resume_from_checkpoint) / LEARNED)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        plan, checkpointing = self.plan, self.plan.settings.gradient_checkpointing
        if checkpointing == "selective":  # not in the arguments, which trackers write as JSON
            model: Any = self.model
            model.gradient_checkpointing_enable(checkpointing_arguments(checkpointing))
        if state.global_step:
            checkpoint = plan.folder / f"checkpoint-{state.global_step}"
            record = TrainingRecord.model_validate_json((checkpoint / RECORD).read_text())
            self.seconds = record.tokens / record.tokens_per_second  # type: ignore[operator]
            self.record = record.model_copy(update={"processes": world.size()})
        else:
            per_token = self._count_operations()
            self.record = self.record.model_copy(update={"flops_per_token": per_token})
        self.progress.start(f"training {plan.adapter}", plan.tokens, self.record.tokens)
        self.begun = time.perf_counter() - self.record.wall_seconds
        if not state.global_step:
            self._validate(state)
            tracking.hand_on(self, self.tracked)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        plan, step = self.plan, state.global_step
        self.seconds += time.perf_counter() - self.started
        weighted = zip(self.shares, self.step_losses, strict=True)
        loss = sum(weight * loss for weight, loss in weighted)
        tokens = step * plan.tokens_per_step
        learned = (self.record.learned_tokens or 0) + round(self.learned_tokens)
        found: dict[str, Any] = {
            "tokens": tokens,
            "learned_tokens": learned,
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
        if plan.tracking and (self.tracked or step % plan.log_steps == 0):
            numbers = (loss, self.step_losses, self.norms, self.rates)
            self.tracked |= tracking.of_step(plan, self.record, *numbers)
            tracking.hand_on(self, self.tracked)
        elapsed = {"wall_seconds": time.perf_counter() - self.begun}
        self.record = self.record.model_copy(update=elapsed)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def _validate(self, state: TrainerState) -> None:
        plan, step = self.plan, state.global_step
        means, tracked = self.validation.measure(self.head)
        if not all(map(math.isfinite, means.values())):
            raise TrainingError(
                f"The validation loss is not finite at step {step}: {means}. {self.advice}"
            )
        tokens = step * plan.tokens_per_step
        point = CurvePoint(step=step, tokens=tokens, validation_loss=means)
        curve = (*self.record.curve, point)
        best = min(curve, key=self._weighted)
        self.record = self.record.model_copy(update={"curve": curve, "kept_step": best.step})
        if best is point and step < plan.steps:
            world.once(lambda: self._keep(plan.folder / BEST.format(step)))
        self.tracked |= tracked
        self.progress.say(
            f"{plan.adapter}: {tokens:,} tokens, validation loss "
            + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        )

    def _keep(self, file: Path) -> None:
        with writing(file.parent):
            save_learned(self.learned, file)

    def _weighted(self, point: CurvePoint) -> float:
        weights = zip(self.shares, point.validation_loss.values(), strict=True)
        return sum(weight * loss for weight, loss in weights)
