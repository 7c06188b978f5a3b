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

from recycle import backbone as backbones
from recycle import results
from recycle.progress import Display
from recycle.recipe import resolve
from recycle.run.measure import prepare_data
from recycle.run.record import device_of, hardware, with_dtype
from recycle.train import add_adapter, jobs, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", help="a recipe, as for `recycle run`")
    parser.add_argument("--rates", required=True, help="separated by commas")
    parser.add_argument("--out", type=Path, help="write the losses there as JSON")
    options, overrides = parser.parse_known_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    try:
        recipe = resolve(options.target, overrides).recipe
        device = device_of(recipe)
        model, tokenizer, _ = backbones.load_backbone(with_dtype(recipe.backbone, device), device)
        splits = prepare_data(recipe, tokenizer)
    except ValueError as error:
        sys.exit(str(error))
    dtype = str(model.dtype).removeprefix("torch.")

    losses: dict[float, dict[str, float]] = {0.0: {}} | {rate: {} for rate in rates}
    curves: list[dict[str, Any]] = []
    console = Console()
    with Display(console) as display, tempfile.TemporaryDirectory() as scratch:
        for job in jobs(recipe):
            for rate in rates:
                adapted = add_adapter(model, job, recipe, splits.starts)
                folder = Path(scratch) / f"{job.adapter}-{rate}"
                tried = replace(job, prefix_learning_rate=rate)
                display.say(f"{job.adapter} at {rate:g}")
                record = train(adapted, tokenizer, tried, splits, recipe, folder, display)
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
            "hardware": hardware(device).model_dump(mode="json"),
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
