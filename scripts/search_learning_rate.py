"""Validation losses of a recipe's adapters at several prefix learning rates, the control's too.

Every adapter gets the same rates, start, tokens and order of blocks. The test split is not read; do
not change data.test_documents in a search, since that moves documents between test and validation.

python scripts/search_learning_rate.py TARGET --rates 3e-3,1e-2 [--out FILE.json] [KEY=VALUE ...]
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

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle import results
from recycle.errors import RecycleError
from recycle.progress import display
from recycle.recipe import resolve
from recycle.run.folder import Found
from recycle.run.machine import describe
from recycle.run.materials import load_materials
from recycle.run.plan import plan_run
from recycle.train import add_adapter, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", help="a recipe, as for `recycle run`")
    parser.add_argument("--rates", required=True, help="separated by commas")
    parser.add_argument("--out", type=Path, help="write the losses there as JSON")
    options, overrides = parser.parse_known_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    losses: dict[float, dict[str, float]] = {0.0: {}} | {rate: {} for rate in rates}
    curves: list[dict[str, Any]] = []
    console = Console()
    with display(console) as progress, tempfile.TemporaryDirectory() as scratch:
        try:
            recipe = resolve(options.target, overrides).recipe
            plan = plan_run(Found(recipe, Path(scratch), None))
            materials = load_materials(plan, progress)
        except RecycleError as error:
            sys.exit(str(error))
        model: Any = materials.model
        dtype, splits = str(model.dtype).removeprefix("torch."), materials.splits
        for training in plan.trainings:
            for rate in rates:
                tried = replace(
                    training,
                    learning_rates={**training.learning_rates, "prefix": rate},
                    folder=Path(scratch) / f"{training.adapter}-{rate}",
                )
                quantization = recipe.backbone.quantization
                adapted = add_adapter(model, tried, recipe.method, splits.starts, quantization)
                progress.say(f"{training.adapter} at {rate:g}")
                size = recipe.evaluation.batch_size
                record = train(adapted, tried, splits.train, splits.validation, size, progress)
                model = adapted.unload()
                losses[0.0] |= record.curve[0].validation_loss  # before the first step
                losses[rate] |= record.curve[-1].validation_loss
                curves.append({"rate": rate, **record.model_dump(mode="json")})

    names = list(losses[0.0])
    table = Table("prefix learning rate", *names, title="validation loss, nats per token")
    for rate, row in losses.items():
        table.add_row(f"{rate:g}" if rate else "untrained", *(f"{row[n]:.4f}" for n in names))
    console.print(table)
    if options.out:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "hardware": describe(plan.device).model_dump(mode="json"),
            "dtype": dtype,
            "packages": results.packages(),
            "recipe": recipe.model_dump(mode="json"),
            "validation_documents": [document.name for document in splits.validation],
            "losses": {str(rate): row for rate, row in losses.items()},
            "trainings": curves,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
