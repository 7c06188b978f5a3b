"""Made-up records for the report: all that a record can hold, and a law in place of a fit."""

import math
import random
from datetime import UTC, datetime

from recycle.law import Law
from recycle.results import (
    Estimate,
    Estimates,
    Measurement,
    Results,
    Sample,
    StreamUse,
    TaskResult,
    compare,
)
from tests.test_results import make_results

N = 100_000_000
LEVELS = {
    "backbone": 3.0,
    "P = 1": 2.8,
    "LoRA": 2.75,
    "control": 2.78,
    "P = 2": 2.70,
    "P = 4": 2.66,
    "P = 8": 2.6595,
}


class FittedLaw:
    """What `recycle.law.fit_run` gives."""

    law = Law(E=0.6912, A=5.1e9, alpha=0.1894, k=0.2, r2=0.99)

    def loss(self, p: float) -> float:
        return self.law.loss(N, p)

    def band(self, p: float, level: float = 0.95) -> tuple[float, float]:
        loss = self.loss(p)
        return loss - 0.01, loss + 0.01


def streams_of(row: str) -> int:
    return int(row.removeprefix("P = ")) if row.startswith("P") else 1


def recipe_of(seed: int = 0, tokens: int = 20480) -> dict[str, object]:
    """A recipe, as far as a report looks at one."""
    return {
        "name": "full",
        "streams": [2, 4, 8],
        "stages": {"adapt": {"train": "lora"}},
        "training": {"tokens": tokens, "seed": seed},
    }


def losses_of(
    levels: dict[str, float], count: int = 64, noise: float = 0.01, seed: int = 0
) -> dict[str, tuple[float, ...]]:
    """Losses of each row around its level: documents differ much, rows on one document little."""
    rng = random.Random(seed)
    documents = [rng.gauss(0, 0.3) for _ in range(count)]
    return {
        name: tuple(level + x + rng.gauss(0, noise) for x in documents)
        for name, level in levels.items()
    }


def full_results(seed: int = 0, levels: dict[str, float] = LEVELS, **changes: object) -> Results:
    """A record with everything in it: a first stage, streams, estimates, samples and tasks."""
    plain = make_results(losses_of(levels, seed=seed))
    measurements = [
        Measurement(
            name=x.name,
            num_streams=streams_of(x.name),
            losses=x.losses,
            adapter_parameters=0 if x.name == "backbone" else 900_000 * streams_of(x.name),
            kv_bytes_per_token=23040 * streams_of(x.name),
            streams=None
            if streams_of(x.name) == 1
            else StreamUse(
                weights=(1 / streams_of(x.name),) * streams_of(x.name),
                entropy=math.log(streams_of(x.name)),
                error_correlation=0.9 + streams_of(x.name) / 100,
            ),
        )
        for x in plain.models
    ]
    estimates = tuple(
        Estimate(
            p=p,
            adapter_parameters=900_000 * p,
            weights_gib=0.25,
            kv_cache_gib=0.01 * p,
            activations_gib=0.002 * p,
            memory_gib=0.25 + 0.012 * p,
            prefill_s=0.01 * p,
            token_s=0.002 + 0.0001 * p,
            latency_s=0.2 + 0.01 * p,
        )
        for p in sorted({streams_of(name) for name in levels})
    )
    task = {
        "date": datetime(2026, 2, 3, tzinfo=UTC),
        "command": "recycle eval runs/full --task arithmetic",
        "settings": {"documents": 50, "seed": 0},
    }
    rng = random.Random(5)
    right = {name: tuple(float(rng.random() < 0.5) for _ in range(50)) for name in levels}
    fields: dict[str, object] = {
        "backbone": plain.backbone.model_copy(update={"non_embedding_parameters": N}),
        "models": compare(plain.documents, measurements),
        "seeds": {"data": 0, "training": seed},
        "recipe": recipe_of(seed),
        "estimates": Estimates(
            gpu="H100-80GB",
            dtype="bfloat16",
            batch=1,
            input_tokens=512,
            output_tokens=64,
            estimates=estimates,
        ),
        "memory_gib": {"announced": 2.5, "taken": 2.25},
        "samples": (
            Sample(
                prompt="def add(a, b):\n    ",
                replies={name: f"return a + b  # {name}\n\n\nprint(1 < 2 & 3)" for name in levels},
            ),
        ),
        "tasks": (
            TaskResult(
                name="arithmetic", metric="acc", higher_is_better=True, scores=right, **task
            ),
        ),
    }
    return make_results(losses_of(levels, seed=seed), **(fields | changes))
