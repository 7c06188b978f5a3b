"""What transformers' Trainer is told of a plan, and how it makes a batch of rows.

Dimensions: B rows of a micro-batch, S tokens of the longest.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

from recycle.data import IGNORED
from recycle.parscale import checkpointing_arguments

from .plan import TrainingPlan

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def trainer_arguments(plan: TrainingPlan, device: torch.device) -> TrainingArguments:
    """The settings of transformers' Trainer that make it carry out a plan, and nothing else."""
    settings = plan.settings
    arguments = TrainingArguments(
        output_dir=str(plan.folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.blocks_per_process // plan.micro_batch_size,
        ddp_broadcast_buffers=False,
        # Of other weights some need not be in a pass: experts, parts for images.
        ddp_find_unused_parameters=plan.active is None or plan.all_weights,
        lr_scheduler_type=SCHEDULES[settings.decay],
        # The first step of a warm-up has a rate of zero: it must not be the only one.
        warmup_steps=min(math.ceil(settings.warmup * plan.steps), plan.steps - 1),
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        gradient_checkpointing_kwargs=checkpointing_arguments(True),
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        seed=settings.seed,
        bf16=False,  # the backbone's own dtype decides; adapters stay in float32
        fp16=False,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",  # the trainer has its own callbacks
        project=plan.tracking.project if plan.tracking else "none",
        run_name=plan.tracking.run if plan.tracking else None,
        trackio_static_space_id=False,
        # The copy of a batch does not wait for what the GPU has still to do.
        accelerator_config={"non_blocking": device.type == "cuda"},
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # transformers would take all GPUs that a process sees
    return arguments


def arithmetic(plan: TrainingPlan, device: torch.device) -> AbstractContextManager[Any]:
    """Weights that learn are float32 and compute in the backbone's own dtype."""
    dtype = getattr(torch, plan.dtype)
    mixed = plan.all_weights and dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype, enabled=mixed)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The columns of the rows, `[B, S]`; nothing predicts the first token.

    Shorter rows are padded on the right, for which causal attention needs no mask.
    """
    batch = {
        key: pad_sequence(
            [torch.tensor(row[key]) for row in rows],
            batch_first=True,
            padding_value=IGNORED if key == "labels" else 0,
        )
        for key in rows[0]
    }
    batch["labels"][:, 0] = IGNORED
    return batch
