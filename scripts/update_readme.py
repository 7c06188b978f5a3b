"""Write the measured tables into README.md from the JSON files that the repository keeps.

    python scripts/update_readme.py            # from scripts/measured/
    python scripts/update_readme.py --check    # change nothing, fail if README.md is stale

New measurements are kept first: --demo runs/demo/results.json, --bench bench.json,
--rates rates.json, --starts TEXT.json RANDOM.json, --in-4bit DEMO-4BIT.json ON-BFLOAT16.json
DEMO-ON-4BIT.json (results of demo-4bit; of `recycle eval` of it on bfloat16; of demo on nf4).
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recycle import results  # noqa: E402
from recycle.report.result import findings  # noqa: E402

MEASURED = ROOT / "scripts" / "measured"
DEMO = MEASURED / "demo-cpu.json"
BENCH = MEASURED / "bench-overhead-cpu.json"
RATES = MEASURED / "learning-rates-cpu.json"
TEXT = MEASURED / "start-text-cpu.json"
RANDOM = MEASURED / "start-random-cpu.json"
IN_4BIT = MEASURED / "demo-4bit-cpu.json"
OFF_4BIT = MEASURED / "demo-4bit-on-bfloat16-cpu.json"
ON_4BIT = MEASURED / "demo-on-4bit-cpu.json"

Losses = Mapping[str, tuple[float, ...]]  # by model, of each document


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def demo_section() -> str:
    """The demo's table, with what it was measured on."""
    record = results.read(DEMO)
    hardware = record.hardware
    return "\n".join(
        [
            *markdown(results.COLUMNS, results.table(record)),
            "",
            f"`{record.command}`: {record.training[0].tokens:,} tokens, {len(record.documents)} "
            f"held-out documents, nats per token, on {hardware.cores} cores ({hardware.cpu}, "
            f"{record.backbone.dtype}), {record.date:%Y-%m-%d}. The backbone is dequantised from 4 "
            "bits and has likely read this data before: [what that means](#what-it-does-not-do).",
        ]
    )


def findings_section() -> str:
    """What the demo's table says in words."""
    record = results.read(DEMO)
    return "\n".join(
        [
            "What the demo's table says, in nats per token ± one standard error:",
            "",
            *(f"- {x}" for x in findings(record)),
        ]
    )


def bench_section() -> str:
    """The overhead over the work that cannot be avoided."""
    record = json.loads(BENCH.read_text())
    header = ("P", "training", "prefill", "decode")
    rows = [
        (row["p"], *(f"{row[phase]:.2f}" for phase in ("training", "prefill", "decode")))
        for row in record["rows"]
    ]
    return "\n".join(
        [
            "Time of our step as a ratio to the bare backbone's at batch P·B, the work that "
            "cannot be avoided (aim: 1.15, 1.15, 1.25):",
            "",
            *markdown(header, [tuple(map(str, row)) for row in rows]),
            "",
            f"`{record['command']}`, {record['date'][:10]}, {record['hardware']}.",
        ]
    )


def rates_section() -> str:
    """Validation losses by learning rate."""
    record = json.loads(RATES.read_text())
    names = list(next(iter(record["losses"].values())))
    rows = [
        (f"{float(rate):g}" if float(rate) else "untrained", *(f"{row[n]:.4f}" for n in names))
        for rate, row in record["losses"].items()
    ]
    return "\n".join(
        [
            "The learning rates of the demo are those of the lowest validation loss, from the same "
            "search for every adapter:",
            "",
            *markdown(("prefix learning rate", *names), rows),
            "",
            f"`{record['command']}`, {len(record['validation_documents'])} validation documents, "
            f"{record['date'][:10]}, {record['hardware']['cpu']}, {record['dtype']}.",
        ]
    )


def starts_section() -> str:
    """The two starts before any training."""
    rows = []
    for start, path in (("text", TEXT), ("random", RANDOM)):
        record = results.read(path)
        for model in record.models[1:]:
            difference = results.format_difference(model.minus_backbone)
            rows.append((start, model.name, f"{model.loss:.4f}", difference))
    header = ("start", "model", "held-out loss", "− backbone ± se")
    return "\n".join(
        [
            "The start before any training, which is why text is the default:",
            "",
            *markdown(header, rows),
            "",
            f"`{results.read(TEXT).command}` and the same with `method.init=random`, "
            f"{len(record.documents)} held-out documents, {record.date:%Y-%m-%d}.",
        ]
    )


def in_4bit_section() -> str:
    """The demo's adapters trained and measured on nf4 and on bfloat16, in all four ways."""
    run, off, on = (results.read(path) for path in (IN_4BIT, OFF_4BIT, ON_4BIT))
    if not run.documents == off.documents == on.documents:
        sys.exit(f"{IN_4BIT}, {OFF_4BIT} and {ON_4BIT} are not of the same test documents.")
    if off.first is None or on.first is None or off.first.date != run.date:
        sys.exit(f"{OFF_4BIT} and {ON_4BIT} must be of `recycle eval`, the former of {IN_4BIT}.")
    nf4_throughout = {model.name: model.losses for model in run.models}
    nf4_then_bfloat16 = {model.name: model.losses for model in off.models}
    bfloat16_throughout = on.first.losses
    bfloat16_then_nf4 = {model.name: model.losses for model in on.models}

    def losses(of: Losses) -> list[str]:
        return [f"{statistics.fmean(of[name]):.4f}" for name in nf4_throughout]

    def minus(a: Losses, b: Losses) -> list[str]:
        same = [
            a[name] == b[name] for name in nf4_throughout
        ]  # the backbone, in the same precision
        found = [results.paired_difference(a[name], b[name]) for name in nf4_throughout]
        return ["" if x else results.format_difference(y) for x, y in zip(same, found, strict=True)]

    rows = [
        ("trained on nf4, measured on nf4", *losses(nf4_throughout)),
        ("trained on nf4, measured on bfloat16", *losses(nf4_then_bfloat16)),
        ("trained on bfloat16, measured on bfloat16", *losses(bfloat16_throughout)),
        ("trained on bfloat16, measured on nf4", *losses(bfloat16_then_nf4)),
        ("trained on nf4: on bfloat16 − on nf4 ± se", *minus(nf4_then_bfloat16, nf4_throughout)),
        (
            "trained on bfloat16: on nf4 − on bfloat16 ± se",
            *minus(bfloat16_then_nf4, bfloat16_throughout),
        ),
        (
            "measured on nf4: trained on nf4 − on bfloat16 ± se",
            *minus(nf4_throughout, bfloat16_then_nf4),
        ),
        (
            "measured on bfloat16: trained on nf4 − on bfloat16 ± se",
            *minus(nf4_then_bfloat16, bfloat16_throughout),
        ),
    ]
    return "\n".join(
        [
            "The demo with its backbone in nf4 (4 bits) and in bfloat16, in training and in "
            "measuring; held-out loss in nats per token:",
            "",
            *markdown(("", *nf4_throughout), rows),
            "",
            f"`{run.command}`, `recycle run demo`, `{off.command}` and `{on.command}`, "
            f"{run.training[0].tokens:,} tokens, {len(run.documents)} held-out documents, "
            f"{run.hardware.cores} cores ({run.hardware.cpu}), {on.date:%Y-%m-%d}. On nf4, trained "
            "and measured:",
            "",
            *(f"- {x}" for x in findings(run)),
        ]
    )


def updated(text: str) -> str:
    """README.md with its measured sections made anew."""
    sections = (
        ("demo", demo_section()),
        ("findings", findings_section()),
        ("bench", bench_section()),
        ("starts", starts_section()),
        ("rates", rates_section()),
        ("demo-4bit", in_4bit_section()),
    )
    for name, section in sections:
        opening = f"<!-- {name}: made by scripts/update_readme.py -->"
        closing = f"<!-- /{name} -->"
        pattern = re.escape(opening) + ".*?" + re.escape(closing)
        if not re.search(pattern, text, re.DOTALL):
            sys.exit(f"README.md lacks the lines between which this goes:\n{opening}\n{closing}")
        text = re.sub(
            pattern, lambda _, s=section, o=opening, c=closing: f"{o}\n{s}\n{c}", text, flags=re.S
        )
    return text


def main() -> None:
    """Update or check README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="results.json of a demo run, to keep")
    parser.add_argument("--bench", type=Path, help="JSON of scripts/bench_overhead.py, to keep")
    parser.add_argument(
        "--rates", type=Path, help="JSON of scripts/search_learning_rate.py, to keep"
    )
    parser.add_argument(
        "--starts", type=Path, nargs=2, help="results.json of text and random starts"
    )
    parser.add_argument(
        "--in-4bit", type=Path, nargs=3, help="results.json of demo-4bit and of two evaluations"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    arguments = parser.parse_args()
    new_starts = arguments.starts or (None, None)
    new_in_4bit = arguments.in_4bit or (None, None, None)
    for new, kept in (
        (arguments.demo, DEMO),
        (arguments.bench, BENCH),
        (arguments.rates, RATES),
        (new_starts[0], TEXT),
        (new_starts[1], RANDOM),
        (new_in_4bit[0], IN_4BIT),
        (new_in_4bit[1], OFF_4BIT),
        (new_in_4bit[2], ON_4BIT),
    ):
        if new is not None:
            MEASURED.mkdir(exist_ok=True)
            shutil.copyfile(new, kept)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = updated(before)
    if not arguments.check:
        readme.write_text(after)
    elif after != before:
        sys.exit("README.md is stale. Run python scripts/update_readme.py")


if __name__ == "__main__":
    main()
