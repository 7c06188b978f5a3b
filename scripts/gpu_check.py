"""Check the method on a CUDA machine and measure it there: one table, in at most 8 minutes.

It needs torch, transformers and peft alone and runs from a checkout without installation. The
model is random, of about 0.5B parameters, so that nothing is downloaded.

python scripts/gpu_check.py [--model FOLDER_OR_ID] [--out FILE.json]
python scripts/gpu_check.py --device cpu --quick    # the same code at tiny sizes
"""

import argparse
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle.family.adapters import load
from recycle.family.switch import set_p, use_p
from recycle.parscale import ParScaleConfig
from recycle.upstream.importer import import_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
STREAMS = [2, 4, 8]
COMPILE_UNTIL = 360  # seconds after the start; later ones are left out, to end within 8 minutes
WARM_UP = 4  # decode steps


Measured = tuple[str, dict[str, float]]  # as text, and the numbers


class CheckError(Exception):
    """A result is wrong."""


@dataclass
class Row:
    """One line of the table: what was done, `ok`, `FAILED` or `skipped`, and what was found."""

    name: str
    outcome: str
    detail: str
    values: dict[str, float] = field(default_factory=dict)


class Table:
    """The rows so far; a check that raises becomes a failed row, and the next one runs.

    An optional one fails on a wrong result only; where it does not run at all, it is skipped.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, name: str, check: Callable[[], str | Measured], optional: bool = False) -> Row:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found = check()
            row = Row(name, "ok", *((found,) if isinstance(found, str) else found))
        except Exception as error:
            lines = [x.strip() for x in str(error).splitlines() if x.strip()]
            outcome = "skipped" if optional and not isinstance(error, CheckError) else "FAILED"
            row = Row(name, outcome, f"{type(error).__name__}: {' '.join(lines)[:300]}")
        self.rows.append(row)
        return row

    def text(self) -> str:
        width = max(len(row.name) for row in self.rows)
        return "\n".join(
            f"{row.name:<{width}}  {row.outcome:<7}  {row.detail}" for row in self.rows
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and measure streams on a GPU.")
    parser.add_argument("--model", help="folder or Hub id; a random model where not given")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing to read off them")
    parser.add_argument("--out", type=Path, help="write the table there as JSON")
    return parser.parse_args()


def main() -> None:
    started = time.monotonic()
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device here. To try the script: --device cpu --quick.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False

    backbone = measured_model(options, device)  # first, so that a wrong --model is told at once
    table = Table()
    for checkpoint in ("qwen2-p2", "qwen2-p4-tied"):
        for attention in ("sdpa", "eager"):
            table.add(
                f"golden {checkpoint}, {attention}",
                partial(golden, checkpoint, attention, device),
            )
    table.add("P = 1 is the backbone, bit for bit", lambda: backbone_untouched(device))
    table.add("4 -> 2 -> 1 -> 4 gives the same", lambda: switching(device))
    table.add("cached equals uncached", lambda: cached(device))
    table.add("gradients with checkpointing", lambda: checkpointed_gradients(device))
    table.add("compiled equals eager", lambda: compiled_decoding(device), optional=True)
    for bits in QUANTISED:
        name = f"{bits} backbone learns"
        if importlib.util.find_spec("bitsandbytes"):
            table.add(name, partial(quantised, bits, options.model, device))
        else:
            table.rows.append(Row(name, "skipped", "bitsandbytes is not installed"))
    measure(table, backbone, options.quick, started)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {x: metadata.version(x) for x in ("torch", "transformers", "peft")}
    passed = all(row.outcome != "FAILED" for row in table.rows)
    seconds = time.monotonic() - started
    print(f"{name}, " + ", ".join(f"{k} {v}" for k, v in versions.items()) + f", {seconds:.0f} s")
    print(table.text())
    if options.out:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "device": name,
            "versions": {"python": platform.python_version(), **versions},
            "cuda": torch.version.cuda,
            "seconds": round(seconds),
            "passed": passed,
            "rows": [asdict(row) for row in table.rows],
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(0 if passed else 1)


# ---- models


def random_model(
    dtype: torch.dtype = torch.float32, half_billion: bool = False, hidden: int = 64
) -> PreTrainedModel:
    """A random Qwen2: tiny, or with the sizes of Qwen2.5-0.5B."""
    sizes = {
        "vocab_size": 384,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    if half_billion:
        sizes = {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "initializer_range": 0.02,
        }
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True, max_position_embeddings=4096)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def token_ids(model: Any, *shape: int) -> Tensor:
    """Random tokens `[B, S]`, the same in every call, on the model's device."""
    generator = torch.Generator().manual_seed(1)
    size = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    return torch.randint(size, shape, generator=generator).to(device)


def add_streams(model: PreTrainedModel, streams: list[int]) -> PeftModelForCausalLM:
    """Add a nested adapter and move every parameter of it, so that no stream is like another."""
    starts = token_ids(model, streams[-1], 16)
    config = ParScaleConfig(
        num_streams=streams[-1],
        p_values=streams,
        num_virtual_tokens=starts.shape[1],
        start_token_ids=starts.tolist(),
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "parscale_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter))
    return peft_model.eval()


def tiny_streams(device: torch.device) -> PeftModelForCausalLM:
    return add_streams(random_model().to(device), [2, 4])


# ---- checks: each returns what it found and raises where that is wrong


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def largest(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """The largest absolute difference, which must be within the tolerance."""
    difference = (actual.float() - expected.float()).abs().max().item()
    expect(difference <= tolerance, f"{what} differ by {difference:.2g}, allowed is {tolerance:g}")
    return difference


@torch.no_grad()
def golden(checkpoint: str, attention: str, device: torch.device) -> str:
    """Upstream's own outputs on its checkpoints, float32."""
    folder = GOLDEN / checkpoint
    expected = {k: v.to(device) for k, v in load_file(folder / "expected.safetensors").items()}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = import_checkpoint(folder, Path(scratch) / "adapter")
        model = load(adapter, dtype=torch.float32, attn_implementation=attention).to(device)
    ids = expected["input_ids"]
    logits, loss = 0.0, 0.0
    for use_cache in (True, False):
        output = model(input_ids=ids, labels=ids, use_cache=use_cache)
        logits = max(logits, largest(output.logits, expected["logits"], 2e-4, "logits"))
        loss = max(loss, largest(output.loss, expected["loss"].squeeze(), 1e-5, "losses"))
    for options in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        kind = next(f"{k}={v}" for k, v in options.items())
        settings = {"do_sample": False, "eos_token_id": None, "disable_compile": True, **options}
        tokens = model.generate(input_ids=ids, max_new_tokens=12, **settings)
        expect(torch.equal(tokens, expected["greedy"]), f"greedy tokens differ, {kind}")
        tokens = model.generate(input_ids=ids, max_new_tokens=10, num_beams=3, **settings)
        expect(torch.equal(tokens, expected["beam3"]), f"beam search's tokens differ, {kind}")
        tokens = model.generate(
            input_ids=expected["left_padded_input_ids"],
            attention_mask=expected["left_padded_attention_mask"],
            max_new_tokens=12,
            **settings,
        )
        expect(
            torch.equal(tokens, expected["left_padded_greedy"]),
            f"tokens of the left-padded batch differ, {kind}",
        )
    return f"logits within {logits:.1e}, loss within {loss:.1e}, tokens equal"


@torch.no_grad()
def backbone_untouched(device: torch.device) -> str:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        model = random_model(dtype).to(device)
        ids = token_ids(model, 2, 33)
        expected = model(input_ids=ids).logits
        streams = add_streams(model, [2, 4])
        expect(not torch.equal(streams(input_ids=ids).logits, expected), "streams do nothing")
        set_p(streams, 1)
        actual = streams(input_ids=ids).logits
        expect(torch.equal(actual, expected), f"logits of P = 1 are not the backbone's in {dtype}")
    return "float32 and bfloat16"


@torch.no_grad()
def switching(device: torch.device) -> str:
    model = tiny_streams(device)
    ids = token_ids(model, 2, 33)
    found = []
    for p in (4, 2, 1, 4, 2):
        set_p(model, p)
        found.append(model(input_ids=ids).logits)
    expect(torch.equal(found[0], found[3]), "P = 4 changed")
    expect(torch.equal(found[1], found[4]), "P = 2 changed")
    expect(not torch.equal(found[0], found[1]), "P = 2 and P = 4 are the same")
    return "identical"


@torch.no_grad()
def cached(device: torch.device) -> str:
    model = tiny_streams(device)
    ids = token_ids(model, 2, 20)
    difference = 0.0
    for p in (1, 2, 4):
        set_p(model, p)
        expected = model(input_ids=ids, use_cache=False).logits
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=24),
        ):
            pieces = [
                model(input_ids=piece, past_key_values=cache).logits
                for piece in ids.split([7, 1, 1, 8, 1, 2], dim=1)
            ]
            what = f"logits of P = {p} through a {type(cache).__name__}"
            difference = max(difference, largest(torch.cat(pieces, 1), expected, 2e-4, what))
    return f"P = 1, 2, 4, dynamic and static cache, logits within {difference:.1e}"


@torch.no_grad()
def compiled_decoding(device: torch.device) -> str:
    """Single steps on a static cache, compiled as a whole."""
    torch._dynamo.reset()
    model = tiny_streams(device)
    step = compile_step(model, device)
    ids = token_ids(model, 2, 12)
    difference = 0.0
    for p in (4, 2):
        set_p(model, p)
        expected = model(input_ids=ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        pieces = [model(input_ids=ids[:, :6], past_key_values=cache).logits]
        for piece in ids[:, 6:].split(1, dim=1):
            # A CUDA graph writes its next result over this one.
            pieces.append(step(input_ids=piece.clone(), past_key_values=cache).logits.clone())
        actual = torch.cat(pieces, dim=1)
        difference = max(difference, largest(actual, expected, 2e-4, f"logits of P = {p}"))
    return f"P = 2, 4, static cache, logits within {difference:.1e}"


def compile_step(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    if device.type == "cuda":
        return torch.compile(model, fullgraph=True, mode="reduce-overhead")
    return torch.compile(model, fullgraph=True, backend="eager")


def checkpointed_gradients(device: torch.device) -> str:
    """On CUDA the recomputation of activation checkpointing runs in another thread."""
    model = tiny_streams(device).train()
    ids = token_ids(model, 2, 33)
    threads: list[int] = []
    first = model.get_decoder().layers[0].self_attn
    first.register_forward_pre_hook(lambda *_: threads.append(threading.get_ident()))

    def gradients(p: int | None = None) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with nullcontext() if p is None else use_p(model, p):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # after the block has ended
        return {k: v.grad for k, v in model.named_parameters() if v.grad is not None}

    plain = {}
    for p in (2, 4):
        set_p(model, p)
        plain[p] = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    threads.clear()
    again = {4: gradients(), 2: gradients(2)}
    expect(len(threads) == 4, f"a layer ran {len(threads)} times in 2 steps: no recomputation")
    difference = 0.0
    for p, expected in plain.items():
        expect_prefix_gradients(model, expected, p)
        expect(expected.keys() == again[p].keys(), f"P = {p}: other parameters have gradients")
        for name, gradient in expected.items():
            scale = gradient.abs().max().item() + 1e-3
            what = f"P = {p}: gradients of {name}, relative to their largest,"
            found = largest(again[p][name] / scale, gradient / scale, 1e-3, what)
            difference = max(difference, found)
    where = "another thread" if len(set(threads)) > 1 else "the same thread"
    return f"set_p(4) and use_p(2), recomputed in {where}, within {difference:.1e} of the largest"


def expect_prefix_gradients(model: nn.Module, gradients: dict[str, Tensor], p: int) -> int:
    """Every prefix of the streams in use, and only of those, has a finite gradient."""
    names = [n for n, _ in model.named_parameters() if "parscale_keys" in n or "parscale_val" in n]
    for name in names:
        expect(name in gradients, f"{name} has no gradient")
        gradient = gradients[name]
        expect(bool(torch.isfinite(gradient).all()), f"the gradient of {name} is not finite")
        used = gradient.flatten(1).abs().amax(dim=1) > 0
        expect(bool(used[:p].all()), f"a stream in use has no gradient in {name}")
        expect(not bool(used[p:].any()), f"a stream not in use has a gradient in {name}")
    return len(names)


QUANTISED: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def quantised(bits: str, source: str | None, device: torch.device) -> str:
    """A training step after a pass in eval mode, which on some CPUs repacks nf4 weights."""
    quantization = BitsAndBytesConfig(**QUANTISED[bits])
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            random_model(torch.bfloat16, hidden=256).save_pretrained(scratch)
        backbone = AutoModelForCausalLM.from_pretrained(
            source or scratch,
            quantization_config=quantization,
            dtype=torch.bfloat16,
            device_map={"": device},
        )
    model = add_streams(backbone, [2, 4])
    ids = token_ids(model, 1, 32)
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    expect(bool(torch.isfinite(loss)), f"the loss is {loss.item()}")
    gradients = {k: v.grad for k, v in model.named_parameters() if v.grad is not None}
    count = expect_prefix_gradients(model, gradients, 4)
    return f"loss {loss.item():.2f}, {count} prefixes with finite gradients"


# ---- speed


def measured_model(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    dtype = getattr(torch, options.dtype)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    else:
        model = random_model(dtype, half_billion=not options.quick)
    return model.to(device)


def measure(table: Table, backbone: PreTrainedModel, quick: bool, started: float) -> None:
    """Prefill, decode and compiled decode at batch 1, of the bare backbone and of each P."""
    sizes = (12, 2, 1) if quick else (512, 32, 5)
    table.add("speed of backbone", partial(time_eager, backbone, *sizes))
    model = add_streams(backbone, STREAMS)
    for p in STREAMS:
        set_p(model, p)
        table.add(f"speed of P = {p}", partial(time_eager, model, *sizes))

    def compiled(name: str, model: nn.Module) -> None:
        if time.monotonic() - started > COMPILE_UNTIL:
            table.rows.append(Row(f"speed of {name}, compiled", "skipped", "no time left"))
        else:
            check = partial(time_compiled, model, *sizes)
            table.add(f"speed of {name}, compiled", check, optional=True)

    for p in STREAMS:
        set_p(model, p)
        compiled(f"P = {p}", model)
    compiled("backbone", model.unload())


def time_eager(model: Any, prompt_tokens: int, new_tokens: int, repeats: int) -> Measured:
    prompt = token_ids(model, 1, prompt_tokens)
    if prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats(prompt.device)
    time_prefill(model, prompt)
    prefill = 1000 * statistics.median(time_prefill(model, prompt) for _ in range(repeats))
    cache = DynamicCache(config=model.config)
    decode = time_decode(model, model, prompt, cache, new_tokens, repeats)
    text = f"prefill of {prompt_tokens} tokens {prefill:.2f} ms, decode {decode:.2f} ms/token"
    values = {"prefill_ms": prefill, "decode_ms": decode}
    if prompt.is_cuda:
        values["peak_gib"] = torch.cuda.max_memory_allocated(prompt.device) / 2**30
        text += f", peak memory {values['peak_gib']:.2f} GiB"
    return text, values


def time_compiled(model: Any, prompt_tokens: int, new_tokens: int, repeats: int) -> Measured:
    torch._dynamo.reset()
    prompt = token_ids(model, 1, prompt_tokens)
    length = prompt_tokens + WARM_UP + repeats * new_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    step = compile_step(model, prompt.device)
    decode = time_decode(step, model, prompt, cache, new_tokens, repeats)
    return f"decode {decode:.2f} ms/token", {"decode_ms": decode}


@torch.no_grad()
def time_prefill(model: nn.Module, prompt: Tensor) -> float:
    started = clock(prompt)
    model(input_ids=prompt, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return clock(prompt) - started


@torch.no_grad()
def time_decode(
    step: Callable[..., Any],
    model: nn.Module,
    prompt: Tensor,
    cache: DynamicCache | StaticCache,
    new_tokens: int,
    repeats: int,
) -> float:
    """Median milliseconds of a greedy step, over runs of `new_tokens` steps on one cache."""
    logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits

    def run(steps: int) -> float:
        nonlocal logits
        started = clock(prompt)
        for _ in range(steps):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = step(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        return (clock(prompt) - started) / steps

    run(WARM_UP)
    return 1000 * statistics.median(run(new_tokens) for _ in range(repeats))


def clock(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
