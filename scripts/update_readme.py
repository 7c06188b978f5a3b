"""Write the measured tables: the two stages' into README.md, all into scripts/measured/README.md.

    python scripts/update_readme.py            # from the records in scripts/measured/
    python scripts/update_readme.py --check    # change nothing; fail if a table is out of date

To keep a new measurement, copy its JSON over the record of the same kind in scripts/measured/.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recycle import results  # noqa: E402
from recycle.report import list_warnings, state_findings  # noqa: E402
from recycle.report.document import state_kept_steps  # noqa: E402
from recycle.report.markdown import bullets, format_table, join_blocks  # noqa: E402

MEASURED = ROOT / "scripts" / "measured"
OPENING, CLOSING = "<!-- {}: made by scripts/update_readme.py -->", "<!-- /{} -->"
INTRODUCTION = """\
Made by `python scripts/update_readme.py` from the records in this folder. Losses are in nats per
token on documents that training did not see; lower is better; ± is one standard error.
**backbone** is the untouched model. **control** is plain prefix tuning: one stream with a prefix,
trained on the same text. Which model types can have streams is in [families.md](families.md)."""


def read(name: str) -> results.Results:
    """The record of a run or of `recycle eval`."""
    return results.read(MEASURED / f"{name}.json")


def describe(record: results.Results) -> str:
    """How a record was made: command, size, date and hardware."""
    hardware, documents = record.hardware, record.documents
    machine = hardware.gpu or f"{hardware.cores} cores ({hardware.cpu})"
    tokens, lengths = record.training[0].tokens, sorted({x.tokens for x in documents})
    length = " to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))
    return (
        f"`{record.command}`: {f'{tokens:,} training tokens' if tokens else 'no training'}, "
        f"{len(documents)} test documents of {length} tokens. "
        f"{record.date:%Y-%m-%d}, {machine}, {results.precision(record.backbone)}."
    )


def demo_table() -> str:
    """The demo's table, and how small the run is."""
    record = read("demo-cpu")
    return join_blocks(
        format_table(results.tabulate(record)),
        results.shared_training(record),
        f"A demonstration, kept small to be quick. {describe(record)}",
    ).rstrip()


def two_stage_table() -> str:
    """The table of a run through both stages, and how small it is."""
    record = read("two-stage-cpu")
    return join_blocks(
        format_table(results.tabulate(record)),
        f"A demonstration, kept small to be quick. {state_kept_steps(record)} {describe(record)}",
    ).rstrip()


def two_stages() -> str:
    """Both stages, beside a LoRA on the same tokens."""
    record = read("two-stage-cpu")
    return join_blocks(
        "A LoRA on 80 % of the tokens, streams on top of it with the rest, and beside them a LoRA "
        "on all of them. Far too small to tell what two stages bring with a real budget. In nats "
        "per token:",
        bullets(state_findings(record)),
        two_stage_table(),
        "Before you believe it:",
        bullets(list_warnings(record)),
    )


def chat() -> str:
    """Both stages on conversations with checkable answers."""
    record = read("two-stage-chat-cpu")
    return join_blocks(
        "The same on small tasks (arithmetic, strings, lists) as conversations; what is learned "
        "and measured is the assistant's turn, and its answer is right or wrong:",
        bullets(state_findings(record)),
        format_table(results.tabulate(record)),
        f"A demonstration. {state_kept_steps(record)} {describe(record)}",
        "Before you believe it:",
        bullets(list_warnings(record)),
    )


def demo() -> str:
    """The demo."""
    record = read("demo-cpu")
    return join_blocks(
        "A run of a few minutes on a CPU, too small to tell what P brings with a real budget. In "
        "nats per token:",
        bullets(state_findings(record)),
        demo_table(),
        "Before you believe it:",
        bullets(list_warnings(record)),
    )


def starts() -> str:
    """Text start and random start."""
    runs = {"text": read("start-text-cpu"), "random": read("start-random-cpu")}
    rows = [("start", "model", "held-out loss", "− backbone ± se")]
    told = []
    for start, record in runs.items():
        for model in record.models[1:]:
            difference = results.format_difference(model.minus_backbone)
            rows.append((start, model.name, f"{model.loss:.4f}", difference))
        told.append(f"{difference} with a {start} start")
    return join_blocks(
        f"Before any training, {model.name} minus backbone is {' and '.join(told)}. This is why "
        "text is the default. On other text, or in shorter blocks, a text start can be worse than "
        "the backbone.",
        format_table(rows),
        *map(describe, runs.values()),
    )


def rates() -> str:
    """Learning rates of the demo."""
    record = json.loads((MEASURED / "learning-rates-cpu.json").read_text())
    losses: Mapping[str, Mapping[str, float]] = record["losses"]  # by rate, by model
    names = list(next(iter(losses.values())))
    best = {name: min(losses, key=lambda rate: losses[rate][name]) for name in names}
    rows = [
        (f"{float(rate):g}" if float(rate) else "untrained", *(f"{row[n]:.4f}" for n in names))
        for rate, row in losses.items()
    ]
    told = ", ".join(f"{float(rate):g} ({name})" for name, rate in best.items())
    return join_blocks(
        f"The validation loss is lowest at a prefix learning rate of {told}. Every adapter had the "
        "same search.",
        format_table([("prefix learning rate", *names), *rows]),
        f"`{record['command']}`: {record['trainings'][0]['tokens']:,} training tokens, "
        f"{len(record['validation_documents'])} validation documents. {record['date'][:10]}, "
        f"{record['hardware']['cores']} cores ({record['hardware']['cpu']}), {record['dtype']}.",
    )


def rates_of_stages() -> str:
    """Learning rates of both stages."""
    record = json.loads((MEASURED / "learning-rates-two-stage-cpu.json").read_text())
    losses: Mapping[str, Mapping[str, float]] = record["losses"]  # by rate, by model
    names = list(dict.fromkeys(name for row in losses.values() for name in row))
    best = {
        name: min((x for x in losses if name in losses[x]), key=lambda rate: losses[rate][name])
        for name in names
    }
    rows = [
        (
            f"{float(rate):g}" if float(rate) else "untrained",
            *(f"{row[n]:.4f}" if n in row else "" for n in names),
        )
        for rate, row in losses.items()
    ]
    told = ", ".join(f"{float(rate):g} ({name})" for name, rate in best.items())
    return join_blocks(
        f"The validation loss is lowest at {told}. Every row had the same search: a LoRA's rates "
        "for P = 1 and LoRA, a prefix's for the others, which were searched on the best P = 1. The "
        "default of a LoRA is 1e-3 at any size of a step; that of a prefix grows with the fourth "
        "root of the tokens in a step, from 1e-2 at 256: 3e-2 was best at 64 times as many.",
        format_table([("learning rate", *names), *rows]),
        f"`{record['command']}`: "
        + ", ".join(
            f"{x['name']} on {x['tokens']:,} tokens"
            for x in {x["name"]: x for x in record["trainings"]}.values()
        )
        + f"; {len(record['validation_documents'])} validation documents. {record['date'][:10]}, "
        f"{record['hardware']['cores']} cores ({record['hardware']['cpu']}), {record['dtype']}.",
    )


def four_bits() -> str:
    """The demo on a 4-bit backbone."""
    run, off, on = map(read, ("demo-4bit-cpu", "demo-4bit-on-bfloat16-cpu", "demo-on-4bit-cpu"))
    if off.first is None or on.first is None or off.first.date != run.date:
        sys.exit("demo-4bit-on-bfloat16-cpu and demo-on-4bit-cpu must be by `recycle eval`.")
    if not run.documents == off.documents == on.documents:
        sys.exit("The records of the demo on a 4-bit backbone are not of the same documents.")
    nf4, moved_off, moved_on = ({x.name: x.losses for x in r.models} for r in (run, off, on))
    bfloat16 = on.first.losses

    def minus(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
        same_backbone = a[results.BACKBONE] == b[results.BACKBONE]
        return name, *(
            ""
            if same_backbone and model == results.BACKBONE
            else results.format_difference(
                results.paired_difference(a[model], b[model], run.tokens)
            )
            for model in nf4
        )

    measured = {
        "trained on nf4, measured on nf4": nf4,
        "trained on nf4, measured on bfloat16": moved_off,
        "trained on bfloat16, measured on bfloat16": bfloat16,
        "trained on bfloat16, measured on nf4": moved_on,
    }
    rows = [
        (k, *(f"{statistics.fmean(v[model]):.4f}" for model in nf4)) for k, v in measured.items()
    ]
    return join_blocks(
        "Train in the precision that you serve in: on nf4 (4 bits), adapters trained on nf4 are "
        "better, and on bfloat16, adapters trained on bfloat16 are.",
        format_table(
            [
                ("", *nf4),
                *rows,
                minus("trained on nf4: on bfloat16 − on nf4 ± se", moved_off, nf4),
                minus("trained on bfloat16: on nf4 − on bfloat16 ± se", moved_on, bfloat16),
                minus("measured on nf4: trained on nf4 − on bfloat16 ± se", nf4, moved_on),
                minus(
                    "measured on bfloat16: trained on nf4 − on bfloat16 ± se", moved_off, bfloat16
                ),
            ]
        ),
        "These are runs of a longer demo, with data.block_size=256 data.validation_documents=8 "
        "training.tokens=20k training.validation_steps=39 evaluation.speed=true.",
        "Trained and measured on nf4:",
        bullets(state_findings(run)),
        *map(describe, (run, off, on)),
    )


def overhead() -> str:
    """Overhead."""
    record = json.loads((MEASURED / "bench-overhead-cpu.json").read_text())
    phases = ("training", "prefill", "decode")
    rows = [(str(row["p"]), *(f"{row[phase]:.2f}" for phase in phases)) for row in record["rows"]]
    most = max(row[phase] for row in record["rows"] for phase in phases)
    return join_blocks(
        "Time of a step with P streams, divided by that of the bare backbone on a batch P times as "
        f"large, which is work that no implementation can avoid: {most:.2f} at most.",
        format_table([("P", *phases), *rows]),
        *nested_training(record),
        f"`{record['command']}`. {record['date'][:10]}, {record['hardware']}.",
    )


def nested_training(record: dict[str, Any]) -> list[str]:
    """What the training of all P in one pass takes, where that was measured."""
    if "nested" not in record:
        return []
    found = {step: f"{ratio:.2f}" for step, ratio in record["nested"].items()}
    streams = ", ".join(str(row["p"]) for row in record["rows"])
    return [
        f"Nested training of P = {streams} in one pass takes {found['nested']} times the bare "
        f"forward and backward at the same stream-tokens, with all else that a step of a run does "
        f"{found['whole step']} times, and {found['/ separate']} of the time of separate passes."
    ]


def decode_table() -> str:
    """A step of decoding and a prefill, beside the bare backbone's."""
    record = json.loads((MEASURED / "decode-cpu.json").read_text())
    header = ["P", "prefill, ms", "/ bare at P·B"]
    for how in ("eager", "compiled"):
        header += [f"{how} step, ms", "/ bare", "/ bare at P·B", "/ limit"]
    by_p: dict[int, dict[bool, Any]] = {}
    for row in sorted(record["rows"], key=lambda row: row["p"]):
        by_p.setdefault(row["p"], {})[row["compiled"]] = row
    rows = []
    for p, found in by_p.items():
        prefill = found[False]["ratios"]["prefill over bare at P·B"]
        cells = [str(p), f"{found[False]['prefill_ms']:.0f}", f"{prefill:.2f}"]
        for compiled in (False, True):
            ratios = found[compiled]["ratios"]
            names = ("step over bare", "step over bare at P·B", "step over its limit")
            cells += [f"{found[compiled]['step_ms']:.0f}", *(f"{ratios[x]:.2f}" for x in names)]
        rows.append(cells)
    return join_blocks(
        format_table([header, *rows]),
        f"`{record['command']}`: SmolLM2-135M, one prompt of {record['prompt']} tokens; **bare at "
        "P·B** is the bare model on P sequences, **limit** the bytes to read over the bandwidth. "
        f"To choose P takes {record['choice_us']['set_p']:.0f} µs. "
        f"{record['date'][:10]}, {record['hardware']}, {record['dtype']}.",
    ).rstrip()


def decoding() -> str:
    """Decoding."""
    return join_blocks(
        "Through `generate`, in turns with the bare model, which is compiled in the same way. What "
        "was tried, dead ends included: [decoding.md](decoding.md).",
        decode_table(),
    )


def family_memory() -> str:
    """Memory of a family."""
    record = json.loads((MEASURED / "family-memory.json").read_text())
    names = {"nested": "nested P = 2, 4, 8", "separate": "three adapters", "only": "P = 4 alone"}
    rows = [
        (model, name, f"{x[way]:,}", f"{4 * x[way] / 1e6:.1f}", f"{x[way] / x['backbone']:.1%}")
        for model, x in record["parameters"].items()
        for way, name in names.items()
    ]
    return join_blocks(
        "What a family with 48 prefix tokens adds to its backbone, in float32; half of that where "
        "it is loaded for a backbone that computes in bfloat16. A nested one holds "
        "the prefixes of P = 8 and an aggregator for each P; `recycle.load(RUN, only=[4])` keeps "
        "P = 4 alone.",
        format_table([("backbone", "family", "parameters", "MB", "of the backbone's"), *rows]),
        f"`{record['command']}`. {record['date'][:10]}.",
    )


def training_memory_table() -> str:
    """Memory of a training step by P, activation checkpointing and streams held at once."""
    record = json.loads((MEASURED / "training-memory-cpu.json").read_text())
    names = {False: "none", "selective": "selective", True: "full"}
    cells: dict[tuple[int, int | None], dict[Any, Any]] = {}
    for cell in record["cells"]:
        cells.setdefault((cell["p"], cell["at_once"]), {})[cell["checkpointing"]] = cell
    rows = [
        (str(p) if at_once is None else f"{p}, {at_once} at once", *shown)
        for (p, at_once), row in cells.items()
        for shown in [[f"{row[level]['growth_gib']:.2f}" for level in names]]
    ]
    hardware = record["hardware"]
    machine = hardware["gpu"] or f"{hardware['cores']} cores ({hardware['cpu']})"
    weights = statistics.median(cell["weights_gib"] for cell in record["cells"])
    return join_blocks(
        format_table([("P", *(f"{name}, GiB" for name in names.values())), *rows]),
        f"`{record['command']}`: the most that tensors take in a forward and backward pass, "
        f"besides {weights:.2f} GiB of weights; {record['rows']} row of {record['tokens']} tokens. "
        f"{record['date'][:10]}, {machine}, {record['dtype']}.",
    ).rstrip()


def training_memory() -> str:
    """Memory of a training step."""
    return join_blocks(
        "By `training.gradient_checkpointing`: false (none), selective, or true (full).",
        training_memory_table(),
    )


def policies() -> str:
    """Policies."""
    record = json.loads((MEASURED / "policies-cpu.json").read_text())
    rows = record["rows"]

    def minus(row: Mapping[str, Any], name: str) -> str:
        single = max(row["shares"].values()) == 1 and name == "minus_anywhere"
        compared = results.Difference.model_validate(row[name])
        return "" if single or not compared.standard_error else results.format_difference(compared)

    largest = max(rows[0]["shares"], key=int)
    header = (
        *("policy", "held-out loss", f"− P = {largest} ± se", "− same shares anywhere ± se"),
        *(f"steps at {p}" for p in rows[0]["shares"]),
        "tokens/s",
    )
    cells = (
        (
            row["policy"],
            f"{row['loss']:.4f}",
            minus(row, "minus_largest"),
            minus(row, "minus_anywhere"),
            *(f"{share:.0%}" for share in row["shares"].values()),
            f"{row['tokens_per_second']:.1f}",
        )
        for row in rows
    )
    return join_blocks(
        "P that changes in mid-generation: by a schedule, or by confidence, which goes one P up "
        "after a step whose two likeliest tokens are closer than a margin, and one down after "
        f"{record['patience']} steps that are not. **Same shares anywhere** is the loss if as many "
        "steps had each P, but without regard to what the policy looks at: a rule that is worth "
        "its trouble is below it.",
        told_of_policies(rows),
        format_table([header, *cells]),
        f"`{record['command']}`: {len(record['documents'])} test documents, "
        f"{record['predicted_tokens']:,} tokens; speed is the median of {record['prompts']} greedy "
        f"decodings of {record['new_tokens']} tokens, with a prompt of {record['prompt_tokens']} "
        "and every change of P, and schedules change at the same step. "
        f"{record['date'][:10]}, {record['hardware']['cores']} cores "
        f"({record['hardware']['cpu']}), {record['dtype']}. {record['note']}".rstrip(),
    )


def told_of_policies(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the confidence rule brings, in words."""
    rules = [row for row in rows if row["policy"].startswith("margin")]
    compared = [results.Difference.model_validate(row["minus_anywhere"]) for row in rules]
    better = [x for x in compared if x.distinguishable and x.mean < 0]
    fixed = [row for row in rows if max(row["shares"].values()) == 1]
    beaten = [
        row
        for row in rules
        if any(
            x["tokens_per_second"] >= row["tokens_per_second"] and x["loss"] <= row["loss"]
            for x in fixed
        )
    ]
    return (
        f"Of {len(rules)} margins, {len(better)} give a clearly lower loss than the same shares "
        f"anywhere. {len(beaten)} of {len(rules)} are both slower and no better than some fixed P."
    )


SECTIONS = {
    "Demo": demo,
    "Two stages": two_stages,
    "Two stages on conversations": chat,
    "Text start and random start": starts,
    "Learning rates of the demo": rates,
    "Learning rates of both stages": rates_of_stages,
    "The demo on a 4-bit backbone": four_bits,
    "Policies": policies,
    "Decoding": decoding,
    "Overhead": overhead,
    "Memory of a family": family_memory,
    "Memory of a training step": training_memory,
}


TABLES = {  # in README.md
    "two-stage": two_stage_table,
    "decode": decode_table,
    "training-memory": training_memory_table,
}


def measured_readme() -> str:
    """scripts/measured/README.md."""
    sections = (f"## {heading}\n\n{make()}".rstrip() for heading, make in SECTIONS.items())
    return join_blocks("# Measured", INTRODUCTION, *sections)


def update(readme: str) -> str:
    """README.md with its tables made anew."""
    for name, table in TABLES.items():
        first, last = OPENING.format(name), CLOSING.format(name)
        before, opening, rest = readme.partition(first)
        _, closing, after = rest.partition(last)
        if not opening or not closing:
            sys.exit(f"README.md lacks the lines between which a table goes:\n{first}\n{last}")
        readme = f"{before}{first}\n{table()}\n{last}{after}"
    return readme


def main() -> None:
    """Write or check both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check = parser.parse_args().check
    readme, measured = ROOT / "README.md", MEASURED / "README.md"
    for path, text in ((readme, update(readme.read_text())), (measured, measured_readme())):
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale. Run python scripts/update_readme.py")


if __name__ == "__main__":
    main()
