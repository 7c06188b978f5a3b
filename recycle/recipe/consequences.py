"""What follows from a recipe alone, before any machine or model is looked at."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recycle.disk import expand

from .fields import MAPPINGS, flatten, nest
from .schema import Data, Recipe, Training

OUTSIDE_IDENTITY = ("launch", "output", "logging")
# What changes memory, time and rounding, or what is shown: a run may go on with others.
FREE = (
    *("training.micro_batch_size", "training.gradient_checkpointing", "evaluation.batch_size"),
    *("stages.adapt.micro_batch_size", "stages.streams.micro_batch_size", "stages.streams.at_once"),
    *("training.compile", "evaluation.samples"),
)
ADAPT_SHARE = 0.8  # of the budget
StageName = Literal["adapt", "streams"]
# Learning rates that were best at REFERENCE tokens in a step (scripts/measured/README.md). Those of
# prefixes grow with the fourth root of the tokens: at 64 times as many, 3e-2 was best.
REFERENCE = 256
RATES = {"prefix": 1e-2, "control": 1e-2, "lora": 1e-3, "aggregator": 1e-3, "full": 2e-5}
SCALED = ("prefix", "control")


@dataclass(frozen=True)
class Stage:
    """What one stage does: its own values, and for the rest what both stages take."""

    name: StageName
    training: Training
    data: Data
    rates: dict[str, float]
    """By what learns: "lora" or "full"; "prefix", "control", "aggregator" and, with all weights,
    "full"."""
    sections: tuple[str, str]
    """Where the recipe sets its micro-batch and its block size."""

    @property
    def steps(self) -> int:
        """Optimiser steps that meet the token budget to within one; none for no budget."""
        assert self.training.tokens is not None
        return max(self.training.tokens // self.tokens_per_step, int(self.training.tokens > 0))

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.data.block_size

    @property
    def blocks(self) -> int:
        """Blocks that it learns from."""
        return self.steps * self.training.batch_size


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe in their order; a first stage that trains nothing is left out."""
    names: tuple[StageName, ...] = ("adapt", "streams")
    return tuple(_stage(recipe, x) for x in names[recipe.stages.adapt.train == "none" :])


def _stage(recipe: Recipe, name: StageName) -> Stage:
    own = getattr(recipe.stages, name)
    fields = {x: v for x in Training.model_fields if (v := getattr(own, x, None)) is not None}
    training = recipe.training.model_copy(update=fields | {"tokens": stage_tokens(recipe)[name]})
    data = own.data or recipe.data
    if name == "adapt":
        given = {own.train: own.learning_rate}
    else:
        given = {
            "prefix": own.prefix_learning_rate,
            "control": own.control_learning_rate,
            "aggregator": own.aggregator_learning_rate,
        }
        given |= {"full": own.weights_learning_rate} if own.train == "all" else {}
    growth = (training.batch_size * data.block_size / REFERENCE) ** 0.25
    rates = {
        x: RATES[x] * (growth if x in SCALED else 1) if rate is None else rate
        for x, rate in given.items()
    }
    micro_batch = f"stages.{name}" if own.micro_batch_size is not None else "training"
    sections = micro_batch, f"stages.{name}.data" if own.data else "data"
    return Stage(name, training, data, rates, sections)


def stage_tokens(recipe: Recipe) -> dict[StageName, int]:
    """Text tokens of each stage: what it says itself, and else its part of the budget."""
    total = recipe.training.tokens or 0
    adapt, streams = recipe.stages.adapt.tokens, recipe.stages.streams.tokens
    if recipe.stages.adapt.train == "none":
        adapt = 0
    if adapt is None:
        adapt = round(ADAPT_SHARE * total) if streams is None else total - streams
    return {"adapt": adapt, "streams": total - adapt if streams is None else streams}


def identity(recipe: Recipe) -> str:
    """SHA-256 (hex) of what decides the result: not where, how fast, nor what is shown."""
    free = dict.fromkeys((*OUTSIDE_IDENTITY, *FREE), True)
    content = recipe.model_dump(mode="json", exclude=nest(free))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys in which the identities of two recipes differ, in the order of the schema."""
    left, right = flatten(a), flatten(b)
    return [
        key
        for key in left | right
        if key.partition(".")[0] not in OUTSIDE_IDENTITY
        and key not in FREE
        and key not in MAPPINGS  # their entries have keys of their own
        and left.get(key) != right.get(key)
    ]


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return expand(recipe.output.dir or Path("runs") / recipe.name)


def next_free_folder(folder: Path) -> Path:
    """The first of `folder`, `folder-2`, `folder-3`, … that is not there."""
    found, number = folder, 1
    while os.path.lexists(found):  # a link to nothing is in the way as well
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def notes(recipe: Recipe) -> dict[str, str]:
    """What becomes of values that a run changes or fills in, by dotted key."""
    found = {}
    if recipe.output.dir is None:
        found["output.dir"] = f"becomes {run_folder(recipe)}"
    for stage in stages(recipe):
        batch, tokens = stage.training.batch_size, stage.steps * stage.tokens_per_step
        own: Any = getattr(recipe.stages, stage.name)
        derived = own.tokens is None and recipe.stages.adapt.train == "none"
        field = "training.tokens" if derived else f"stages.{stage.name}.tokens"
        if tokens != stage.training.tokens or (own.tokens is None and not derived):
            found[field] = (
                f"becomes {tokens:,}: {stage.steps:,} step{'s' * (stage.steps != 1)} of {batch} "
                f"block{'s' * (batch != 1)} of {stage.data.block_size} tokens"
            )
        for kind, rate in stage.rates.items():
            field = "learning_rate" if stage.name == "adapt" else f"{kind}_learning_rate"
            field = field.replace("full_", "weights_")
            if getattr(own, field) is None:
                at = f" at {stage.tokens_per_step:,} tokens a step" * (kind in SCALED)
                found[f"stages.{stage.name}.{field}"] = f"becomes {rate:.3g}{at}"
    if recipe.backbone.dtype == "auto":
        found["backbone.dtype"] = "becomes bfloat16 where this machine computes in it, else float32"
    if recipe.launch.device == "auto":
        found["launch.device"] = "becomes cuda where there is such a GPU, else mps, else cpu"
    return found
