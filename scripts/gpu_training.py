"""Nested training on a CUDA machine: correct first, then its time, rate and memory.

The shapes are those of Qwen2.5-0.5B and 3B with random weights, so that nothing is downloaded. Each
way to train (compiled layers or not, activations kept or recomputed) is checked against the plain
one's gradients and takes turns with the bare backbone's forward and backward at the same
stream-tokens (training_steps.py). TFLOP/s count 4·N·P for a text token, beside the rate of one
large product of matrices. It takes `pip install '.[train]'`, and leaves out what would begin after
seven minutes. Not run on a GPU so far.

python scripts/gpu_training.py [--out FILE.json]
python scripts/gpu_training.py --device cpu --quick    # the same code at tiny sizes
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle import results
from recycle.evaluate import OutputHead
from recycle.parscale import ParScaleConfig
from recycle.train.compilation import CompiledLayers
from scripts.training_steps import (
    bare_step,
    forward_and_backward,
    hardware,
    seconds,
    turns,
    whole_steps,
)

STREAMS, PREFIX = [2, 4, 8], 48
# hidden size, inner size, layers, heads, key-value heads, vocabulary; and tokens of a row
SHAPES = {
    "0.5B": ((896, 4864, 24, 14, 2, 151936), 1024),
    "3B": ((2048, 11008, 36, 16, 2, 151936), 1024),
    "tiny": ((64, 128, 2, 4, 2, 384), 64),
}
UNTIL = 420  # seconds after the start: later parts are left out
Record = dict[str, Any]
Step = Callable[[], None]


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="Measure nested training on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing to read off them")
    parser.add_argument("--repeats", type=int, default=5, help="after a warm-up")
    parser.add_argument("--cap-gib", type=float, help="as if the card had no more memory")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device here. To try the script: --device cpu --quick.")
    logging.set_verbosity_error()
    if options.cap_gib is not None:
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(options.cap_gib / whole, device)
    dtype = torch.float32 if options.quick else torch.bfloat16
    name = hardware(options.device)
    rate = matrix_rate(device, dtype, 256 if options.quick else 8192)
    print(f"{name}, {dtype}: {rate:.1f} TFLOP/s in one product of matrices")
    rows: list[Record] = []
    for shape in ("tiny",) if options.quick else ("0.5B", "3B"):
        for measure in (training, attention):
            if time.monotonic() - started > UNTIL:
                print(f"no time is left for {measure.__name__} of {shape}")
                continue
            sizes = (options.repeats, rate) if measure is training else ()
            for row in measure(shape, device, dtype, *sizes):
                rows.append(row)
                print(
                    "  ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    ),
                    flush=True,
                )
            if options.out:  # each time: what comes next may fail
                record = {
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "command": shlex.join(["python", *sys.argv]),
                    "hardware": name,
                    "packages": results.packages(),
                    "dtype": str(dtype).removeprefix("torch."),
                    "matrix_tflops": rate,
                    "rows": rows,
                }
                options.out.write_text(json.dumps(record, indent=2) + "\n")


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


def models(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    """Our model, the bare one with the same weights, and tokens `[1, S]`."""
    (hidden, inner, layers, heads, key_heads, vocabulary), length = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        bare = copy.deepcopy(backbone, {id(x): x for x in backbone.parameters()})
        tokens = torch.randint(vocabulary, (1, length))
    config = ParScaleConfig(
        num_streams=STREAMS[-1], p_values=STREAMS, num_virtual_tokens=PREFIX, init="random"
    )
    return get_peft_model(backbone, config), bare, tokens


def training(
    shape: str, device: torch.device, dtype: torch.dtype, repeats: int, rate: float
) -> list[Record]:
    """Every way to train all P in one pass, and the peak memory of each P alone."""
    ours, bare, tokens = models(shape, device, dtype)
    theirs = bare_step(bare, tokens, STREAMS)
    beside = [theirs] if fits(theirs) else []
    passed = 4 * sum(x.numel() for x in bare.parameters()) * STREAMS[-1] * tokens.numel()
    ways = [(compiled, again) for compiled in (False, True) for again in (False, True)]
    rows: list[Record] = []
    with OutputHead(ours.train()) as head:
        run = forward_and_backward(head, tokens, STREAMS)
        with way(ours, run, False, True) as step:
            expected = gradients(ours, step)
        for compiled, again in ways:
            row: Record = {"training": f"{shape}, {'compiled' if compiled else 'eager'}"}
            row["training"] += ", checkpointing" * again
            rows.append(row)
            with way(ours, run, compiled, again) as step:
                if not fits(step):
                    continue
                difference = apart(gradients(ours, step), expected)
                if not difference <= (1e-4 if dtype == torch.float32 else 0.1):
                    sys.exit(f"{row}: gradients differ by {difference:.2g} of their norm")
                row["peak GiB"] = peak(step, ours)
                times = turns([step, *beside], ours, repeats)
            row["pass ms"] = 1000 * statistics.median(mine for mine, *_ in times)
            row |= {"/ bare": statistics.median(x / y for x, y in times)} if beside else {}
            row["TFLOP/s"] = passed / row["pass ms"] / 1e9
            row["of the matrix rate"] = row["TFLOP/s"] / rate
        memory = [
            {"memory": f"{shape}, P = {p}", "peak GiB": peak(step, ours)}
            for p in STREAMS
            for step in [forward_and_backward(head, tokens, [p])]
            if fits(step)
        ]
    for row, (compiled, again) in zip(rows, ways, strict=True):
        if "pass ms" not in row:
            row["memory"] = "too small"
            continue
        settings = {"compile": compiled, "gradient_checkpointing": again}
        turn = theirs if beside else lambda: None
        pairs = whole_steps(ours, turn, tokens, STREAMS, repeats, **settings)
        row["step ms"] = 1000 * statistics.median(mine for mine, _ in pairs)
        row |= {"step / bare": statistics.median(x / y for x, y in pairs)} if beside else {}
        ours.gradient_checkpointing_disable()
    return rows + memory


def fits(step: Step) -> bool:
    """Whether there is memory for a pass."""
    try:
        step()
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def way(ours: Any, run: Step, compiled: bool, again: bool) -> Iterator[Step]:
    """A forward and backward pass with compiled layers or not, with checkpointing or not."""
    if again:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    layers = CompiledLayers(ours) if compiled else None

    def step() -> None:
        with layers or nullcontext():
            run()

    yield step
    if layers:
        layers.release()
    ours.gradient_checkpointing_disable()


def gradients(ours: Any, step: Step) -> Tensor:
    """What the parameters that learn get, as one vector."""
    ours.zero_grad(set_to_none=True)
    step()
    found = [x.grad.flatten() for x in ours.parameters() if x.grad is not None]
    ours.zero_grad(set_to_none=True)
    return torch.cat(found)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def peak(step: Step, ours: Any) -> float:
    """GiB of a pass on a GPU, the weights included; 0 on a CPU."""
    if ours.device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(ours.device)
    gradients(ours, step)
    return torch.cuda.max_memory_allocated(ours.device) / 2**30


def attention(shape: str, device: torch.device, dtype: torch.dtype) -> list[Record]:
    """Ways for the text to see the prefix and itself up to each token: one layer, all streams."""
    (hidden, _, _, heads, _, _), length = SHAPES[shape]
    lengths = (length, PREFIX + length, PREFIX + length)
    query, key, value = (
        torch.randn(STREAMS[-1], heads, x, hidden // heads, device=device, dtype=dtype)
        for x in lengths
    )
    learns = device.type == "cuda"  # flex attention has no backward pass on a CPU
    for tensor in (query, key, value):
        tensor.requires_grad_(learns)
    blocks = create_block_mask(
        lambda b, h, q, k: k <= q + PREFIX, None, None, length, PREFIX + length, device=device
    )
    flex = torch.compile(flex_attention)

    def dummy_rows() -> Tensor:
        rows = F.pad(query, (0, 0, PREFIX, 0))
        return F.scaled_dot_product_attention(rows, key, value, is_causal=True)[:, :, PREFIX:]

    def lower_right() -> Tensor:
        bias = causal_lower_right(length, PREFIX + length)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    def blockwise() -> Tensor:
        return flex(query, key, value, block_mask=blocks)

    ways = (dummy_rows, lower_right, blockwise)
    expected, rows = dummy_rows(), []
    for attend in ways:
        difference = apart(attend(), expected)
        if not difference <= (1e-5 if dtype == torch.float32 else 0.02):
            sys.exit(f"{attend.__name__}: outputs differ by {difference:.2g} of their norm")

        def step(attend: Callable[[], Tensor] = attend) -> None:
            output = attend()
            output.sum().backward() if learns else None

        times = [seconds(step, device) for _ in range(12)][2:]
        row = {"attention": f"{shape}, {attend.__name__}", "ms": 1000 * statistics.median(times)}
        rows.append(row | {"differs by": difference})
    return rows


if __name__ == "__main__":
    main()
