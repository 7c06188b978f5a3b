"""Write the measured tables into README.md from the JSON files that the repository keeps.

    python scripts/update_readme.py            # from scripts/measured/
    python scripts/update_readme.py --check    # change nothing, fail if README.md is stale

New measurements are kept first: --demo runs/demo/results.json, --bench bench.json,
--rates rates.json, --starts TEXT.json RANDOM.json.
"""

import argparse
import json
import re
import shutil
import sys
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


def updated(text: str) -> str:
    """README.md with its measured sections made anew."""
    sections = (
        ("demo", demo_section()),
        ("findings", findings_section()),
        ("bench", bench_section()),
        ("starts", starts_section()),
        ("rates", rates_section()),
    )
    for name, section in sections:
        opening = f"<!-- {name}: made by scripts/update_readme.py -->"
        closing = f"<!-- /{name} -->"
        pattern = re.escape(opening) + ".*?" + re.escape(closing)
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
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    arguments = parser.parse_args()
    new_starts = arguments.starts or (None, None)
    for new, kept in (
        (arguments.demo, DEMO),
        (arguments.bench, BENCH),
        (arguments.rates, RATES),
        (new_starts[0], TEXT),
        (new_starts[1], RANDOM),
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
