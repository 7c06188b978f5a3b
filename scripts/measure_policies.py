"""What policies bring on a finished run: fixed P, schedules, and confidence at several margins.

Loss is exact for the mixture of P: since changing P gives what that P would have given from the
start, one pass of every P over the run's test documents gives the loss and the margin of each
position, and a policy walks along them as it would along new tokens. Speed is that of real greedy
decoding, all policies taking turns on the first tokens of the test documents.

python scripts/measure_policies.py RUN [--out FILE.json] [--margins 0.05,0.2,0.5] [--patience 4]
    [--switch-at 64] [--prompts 5] [--prompt-tokens 32] [--new-tokens 96] [--note TEXT]
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recycle
from recycle import results
from recycle.backbone.generation import decoding
from recycle.data import IGNORED, Document
from recycle.decode.policy import Confidence, Policy, Schedule, generate
from recycle.errors import RecycleError
from recycle.progress import display
from recycle.results.comparison import token_mean
from recycle.run.folder import find_finished
from recycle.run.machine import describe
from recycle.run.materials import load_materials
from recycle.run.plan import plan_run

WARM_UP_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, help="write the record there as JSON")
    parser.add_argument("--margins", default="0.05,0.2,0.5", help="of the confidence rule")
    parser.add_argument("--patience", type=int, default=4)
    parser.add_argument("--switch-at", type=int, default=64, help="step at which schedules change")
    parser.add_argument("--prompts", type=int, default=5, help="for speed, a median over them")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--note", default="", help="of the circumstances, for the record")
    options = parser.parse_args()
    console = Console()
    with display(console) as progress:
        try:
            plan = plan_run(find_finished(options.run, [], options.out and str(options.out)))
            documents = load_materials(plan, progress)[1].splits.test
            placement = {} if plan.device == "cpu" else {"device_map": {"": plan.device}}
            model: Any = recycle.load(options.run, **placement)
        except RecycleError as error:
            sys.exit(str(error))
        model.eval()
        policies = list_policies(recycle.available_p(model), options)
        progress.start("losses", len(documents))
        known = []
        for document in documents:
            known.append(positions(model, document))
            progress.advance(1)
        progress.start("speed", options.prompts * len(policies))
        prompts = [document.input_ids[: options.prompt_tokens] for document in documents]
        speeds: dict[str, list[float]] = {name: [] for name in policies}
        speed(model, next(iter(policies.values())), prompts[0], WARM_UP_TOKENS)
        for prompt in prompts[: options.prompts]:
            for name, policy in policies.items():
                speeds[name].append(speed(model, policy, prompt, options.new_tokens))
                progress.advance(1)
    tokens = [document.predicted_tokens for document in documents]
    rows = tabulate(policies, known, tokens, max(recycle.available_p(model)))
    for row in rows:
        row["tokens_per_second"] = statistics.median(speeds[row["policy"]])
    show(rows, console)
    if options.out:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "hardware": describe(plan.device).model_dump(mode="json"),
            "dtype": str(model.dtype).removeprefix("torch."),
            "packages": results.packages(),
            "recipe": plan.recipe.model_dump(mode="json"),
            "documents": [document.name for document in documents],
            "predicted_tokens": sum(tokens),
            **{name: getattr(options, name) for name in ("prompts", "prompt_tokens", "new_tokens")},
            "switch_at": options.switch_at,
            "patience": options.patience,
            "note": options.note,
            "rows": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


def list_policies(p_values: Sequence[int], options: argparse.Namespace) -> dict[str, Policy]:
    """The rows of the table: each P, schedules between them, and confidence."""
    low, middle, high = p_values[0], p_values[-2], p_values[-1]
    at = options.switch_at
    policies: dict[str, Policy] = {f"P = {p}": Schedule({0: p}) for p in p_values}
    for first, then in ((high, low), (high, middle), (middle, high)):
        policies[f"P = {first}, {then} from step {at}"] = Schedule({0: first, at: then})
    for margin in map(float, options.margins.split(",")):
        policies[f"margin {margin:g}"] = Confidence(p_values, margin, options.patience)
    return policies


@torch.no_grad()
def positions(model: Any, document: Document) -> dict[int, tuple[list[float], list[float]]]:
    """Loss and margin of each of a document's positions, for every P; no loss is 0 for no label."""
    ids = torch.tensor([document.input_ids], device=model.device)
    labels: Tensor = torch.tensor(document.labels[1:], device=model.device)
    found = {}
    for p in recycle.available_p(model):
        with recycle.use_p(model, p):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # [S - 1, V]
        losses = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="none"
        )
        best = logits.softmax(dim=-1).topk(2).values
        found[p] = (losses.tolist(), (best[:, 0] - best[:, 1]).tolist())
    return found


def walk(
    policy: Policy, known: Mapping[int, tuple[list[float], list[float]]]
) -> tuple[list[float], list[int]]:
    """Losses of a document's positions under a policy, and P at each."""
    used: list[int] = []
    margins: list[float] = []
    losses: list[float] = []
    for position in range(len(next(iter(known.values()))[0])):
        p = policy.next_p(used, margins)
        used.append(p)
        losses.append(known[p][0][position])
        margins.append(known[p][1][position])
    return losses, used


def tabulate(
    policies: Mapping[str, Policy],
    known: Sequence[Mapping[int, tuple[list[float], list[float]]]],
    tokens: Sequence[int],
    largest: int,
) -> list[dict[str, Any]]:
    """Each policy's loss, its shares of the steps, and what it adds to them."""
    means = {
        p: [sum(x[p][0]) / n for x, n in zip(known, tokens, strict=True)] for p in known[0]
    }  # of each document
    rows = []
    for name, policy in policies.items():
        walks = [walk(policy, x) for x in known]
        losses = [sum(x) / n for (x, _), n in zip(walks, tokens, strict=True)]
        counts = Counter(p for _, used in walks for p in used)
        shares = {p: counts[p] / counts.total() for p in means}
        # What the same shares would give if they fell on any steps, whatever the policy looks at.
        anywhere = [sum(shares[p] * means[p][i] for p in means) for i in range(len(tokens))]
        rows.append(
            {
                "policy": name,
                "loss": token_mean(losses, tokens),
                "minus_largest": difference(losses, means[largest], tokens),
                "minus_anywhere": difference(losses, anywhere, tokens),
                "shares": {str(p): share for p, share in shares.items()},
            }
        )
    return rows


def difference(a: Sequence[float], b: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    return results.paired_difference(a, b, tokens).model_dump(mode="json")


def speed(model: Any, policy: Policy, prompt: Sequence[int], new_tokens: int) -> float:
    """New tokens per second of greedy decoding, with the prompt and every change of P."""
    ids = torch.tensor([prompt], device=model.device)
    with decoding(model):
        started = time.perf_counter()
        generate(model, policy, ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return new_tokens / (time.perf_counter() - started)


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    columns = ("policy", "loss", "share of steps at each P", "tokens/s")
    table = Table(*columns, title="policies; loss in nats per token")
    for row in rows:
        shares = ", ".join(f"{p}: {share:.0%}" for p, share in row["shares"].items() if share)
        speed_told = f"{row['tokens_per_second']:.1f}"
        table.add_row(row["policy"], f"{row['loss']:.4f}", shares, speed_told)
    console.print(table)


if __name__ == "__main__":
    main()
