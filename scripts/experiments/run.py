"""Run experiments, once for each seed, and print the table of all results.

python scripts/experiments/run.py two-stages streams-alone --seeds 0,1 [KEY=VALUE ...]
python scripts/experiments/run.py --table
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recycle import results
from recycle.results import ModelResult

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes of this folder; KEY=VALUE for all")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go")
    parser.add_argument("--table", action="store_true", help="print the table")
    options = parser.parse_args()
    names = [name for name in options.names if "=" not in name]
    overrides = [name for name in options.names if "=" in name]
    for name in names:
        for seed in options.seeds.split(","):
            run(name, seed, overrides, options.results)
    if options.table or names:
        print(table(options.results))


def run(name: str, seed: str, overrides: list[str], out: Path) -> None:
    """Run one recipe with one seed through the command, and keep its results."""
    folder = Path("runs/experiments") / f"{name}-seed{seed}"
    command = [sys.executable, "-m", "recycle", "run", str(HERE / f"{name}.yaml")]
    settings = [f"output.dir={folder}", f"training.seed={seed}", *overrides]
    subprocess.run([*command, *settings], check=True)
    out.mkdir(exist_ok=True, parents=True)
    shutil.copy(folder / "results.json", out / f"{name}-seed{seed}.json")


def table(folder: Path) -> str:
    """A row of Markdown for each model of each run, in the order of the files."""
    headings = ["experiment", "model", "loss", "− backbone", "− control", "− LoRA", "seconds"]
    headings += ["FLOPs", "ρ", "weights"]
    lines = [headings, ["---"] * 2 + ["---:"] * 7 + ["---"]]
    for file in sorted(folder.glob("*.json")):
        record = results.read(file)
        lines += [[f"{file.stem} ({record.date:%Y-%m-%d})", *row(x)] for x in record.models]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(model: ModelResult) -> list[str]:
    others = model.minus_backbone, model.minus_control, model.minus_weights
    streams = model.streams
    correlation = streams.error_correlation if streams else None
    return [
        model.name,
        f"{model.loss:.4f}",
        *(results.format_difference(x) for x in others),
        "" if model.train_seconds is None else f"{model.train_seconds:,.0f}",
        "" if model.train_flops is None else f"{model.train_flops:.2g}",
        "" if correlation is None else f"{correlation:.3f}",
        ", ".join(f"{x:.3f}" for x in streams.weights) if streams else "",
    ]


if __name__ == "__main__":
    main()
