"""Validation losses of a recipe's trainings at several learning rates, the same for every row.

Prefixes of the streams and of the control get one list of rates, weights at P = 1 (the first stage
and the comparison's) another; all of them the same start, tokens and order of blocks. Streams are
searched on the first stage's weights, at the best of its rates. The test split is not read; do not
change data.test_documents in a search, since that moves documents between test and validation.

python scripts/search_learning_rate.py TARGET --rates 3e-3,1e-2 --weights-rates 3e-4,1e-3
    [--share 0.25] [--out FILE.json] [KEY=VALUE ...]
"""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle import results
from recycle.backbone import load_backbone
from recycle.errors import RecycleError
from recycle.progress import Silent, display
from recycle.recipe import RecipeError, resolve
from recycle.results import TrainingRecord
from recycle.run.folder import Found
from recycle.run.machine import describe
from recycle.run.materials import Materials, load_materials
from recycle.run.plan import RunPlan, plan_run
from recycle.train import TrainingPlan, add_lora, add_streams, free_weights, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", help="a recipe, as for `recycle run`")
    parser.add_argument("--rates", default="", help="of prefixes, separated by commas")
    parser.add_argument("--weights-rates", default="", help="of weights at P = 1")
    parser.add_argument("--share", type=float, default=1.0, help="of each training's steps")
    parser.add_argument("--out", type=Path, help="write the losses there as JSON")
    options, overrides = parser.parse_known_args()
    console = Console()
    with display(console) as progress, tempfile.TemporaryDirectory() as scratch:
        try:
            resolved = resolve(options.target, overrides)
            if resolved.missing:
                raise RecipeError(resolved.chosen, resolved.missing)
            plan = plan_run(Found(resolved.recipe, Path(scratch), None))
            model, materials = load_materials(plan, progress)
        except RecycleError as error:
            sys.exit(str(error))
        search = Search(plan, materials, model, progress)
        for training in plan.trainings:
            rates = options.weights_rates if training.active is None else options.rates
            tried = replace(training, steps=max(1, round(training.steps * options.share)))
            for rate in rates.split(",") if rates else ():
                search.run(tried, float(rate))

    names = list(dict.fromkeys(name for row in search.losses.values() for name in row))
    table = Table("learning rate", *names, title="validation loss, nats per token")
    for rate, row in search.losses.items():
        cells = (f"{row[n]:.4f}" if n in row else "" for n in names)
        table.add_row(f"{rate:g}" if rate else "untrained", *cells)
    console.print(table)
    if options.out:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "hardware": describe(plan.device).model_dump(mode="json"),
            "dtype": plan.recipe.backbone.dtype,
            "packages": results.packages(),
            "recipe": plan.recipe.model_dump(mode="json"),
            "validation_documents": [x.name for x in materials.splits.validation[-1]],
            "losses": {str(rate): row for rate, row in search.losses.items()},
            "trainings": search.records,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


class Search:
    """Trainings of one plan at several rates."""

    def __init__(self, plan: RunPlan, materials: Materials, model: Any, progress: Silent) -> None:
        self.plan, self.materials, self.progress = plan, materials, progress
        self.model = model  # what streams are put on: the backbone, or the best first stage
        self.best = float("inf")  # of the first stage
        self.losses: dict[float, dict[str, float]] = {0.0: {}}  # by rate, 0 before training
        self.records: list[dict[str, Any]] = []

    def run(self, training: TrainingPlan, rate: float) -> None:
        group = next(x for x in ("prefix", "full", "lora") if x in training.learning_rates)
        tried = replace(
            training,
            learning_rates={**training.learning_rates, group: rate},
            folder=training.folder.with_name(f"{training.adapter}-{rate}"),
        )
        self.progress.say(f"{training.adapter} at {rate:g}")
        record = self._weights(tried) if training.active is None else self._streams(tried)
        self.losses[0.0] |= record.curve[0].validation_loss  # before the first step
        self.losses.setdefault(rate, {}).update(record.curve[-1].validation_loss)
        self.records.append({"rate": rate, **record.model_dump(mode="json")})

    def _weights(self, training: TrainingPlan) -> TrainingRecord:
        """Weights of a fresh backbone; the best of the first stage are kept, merged."""
        recipe, splits = self.plan.recipe, self.materials.splits
        backbone, _, _ = load_backbone(recipe.backbone, self.plan.device)
        first = training.adapter == "adapted"
        model: Any = backbone
        if training.all_weights:
            free_weights(backbone)
        else:
            model = add_lora(backbone, training, recipe.stages.adapt)
        rows = splits.train[0] if first else datasets.concatenate_datasets(list(splits.train))
        record = self._train(model, training, rows, splits.validation[0])
        (loss,) = record.curve[-1].validation_loss.values()
        if first and loss < self.best:
            self.best = loss
            self.model = backbone if training.all_weights else model.merge_and_unload()
            self.model.requires_grad_(False)
        return record

    def _streams(self, training: TrainingPlan) -> TrainingRecord:
        recipe, splits = self.plan.recipe, self.materials.splits
        model = add_streams(
            self.model, training, recipe.method, splits.starts, recipe.backbone.quantization
        )
        record = self._train(model, training, splits.train[-1], splits.validation[-1])
        self.model = model.unload()
        return record

    def _train(self, model: Any, training: TrainingPlan, rows: Any, validation: Any) -> Any:
        size = self.plan.recipe.evaluation.batch_size
        return train(model, training, rows, validation, size, self.progress)


if __name__ == "__main__":
    main()
