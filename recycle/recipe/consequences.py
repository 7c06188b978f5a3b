"""What follows from a recipe alone, before any machine or model is looked at."""

import hashlib
import json
import os
from pathlib import Path

from recycle.disk import expand

from .schema import MAPPINGS, Recipe, flatten

OUTSIDE_IDENTITY = ("launch", "output", "logging")


def identity(recipe: Recipe) -> str:
    """SHA-256 (hex) of all that decides the result: everything but launch, output and logging."""
    content = recipe.model_dump(mode="json", exclude=set(OUTSIDE_IDENTITY))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys in which the identities of two recipes differ, in the order of the schema."""
    left, right = flatten(a), flatten(b)
    return [
        key
        for key in left | right
        if key.partition(".")[0] not in OUTSIDE_IDENTITY
        and key not in MAPPINGS  # their entries have keys of their own
        and left.get(key) != right.get(key)
    ]


def training_steps(recipe: Recipe) -> int:
    """Optimiser steps that meet the token budget to within one; none for no budget."""
    per_step = recipe.training.batch_size * recipe.data.block_size
    return max(recipe.training.tokens // per_step, int(recipe.training.tokens > 0))


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
    steps, batch, block = training_steps(recipe), recipe.training.batch_size, recipe.data.block_size
    tokens = steps * batch * block
    found = {}
    if recipe.output.dir is None:
        found["output.dir"] = f"becomes {run_folder(recipe)}"
    if tokens != recipe.training.tokens:
        found["training.tokens"] = (
            f"becomes {tokens:,}: {steps:,} step{'s' * (steps != 1)} of {batch} "
            f"block{'s' * (batch != 1)} of {block} tokens"
        )
    if recipe.backbone.dtype == "auto":
        found["backbone.dtype"] = "becomes bfloat16 where this machine computes in it, else float32"
    if recipe.launch.device == "auto":
        found["launch.device"] = "becomes cuda where there is a GPU, else cpu"
    return found
