"""A forecast as tables for a terminal of 80 columns or more."""

from collections.abc import Iterator
from typing import Any

from recycle.progress import duration

from .forecast import Forecast
from .scaling import PAPER_EQUAL, PAPER_LENGTHS, PAPER_P


def render(forecast: Forecast) -> Iterator[Any]:
    """Tables and lines, in their order."""
    yield (
        f"{forecast.model} ({forecast.model_type}): {_count(forecast.parameters)} parameters, "
        f"{_count(forecast.non_embedding_parameters)} outside the embeddings, in "
        f"{forecast.quantization or forecast.dtype}"
    )
    yield f"GPU: {forecast.gpu}, {forecast.gpu_memory_gib:g} GiB ({forecast.gpu_chosen})"
    yield _inference(forecast)
    yield (
        "P = 1 is the model without streams. Times are what the GPU allows: on an H100, a 3B model "
        "with P = 8 took 2.4 times as long compiled, and 20 times eager."
    )
    if forecast.output_head_gib:
        yield (
            "The output head has a matrix of its own, which this method leaves out: "
            f"{forecast.output_head_gib:.2f} GiB more."
        )
    yield _training(forecast)
    yield (
        f"In all {duration(forecast.training_seconds)} with the comparison, and "
        f"{forecast.training_memory_gib:.1f} GiB{' on each GPU' * (forecast.processes > 1)}; the "
        "run itself measures and says it anew."
    )
    if forecast.scaling:
        yield _scaling(forecast)
        yield (
            f"{_count(forecast.scaling.parameters)} outside the embeddings are what the law of "
            f"arXiv 2505.10475 puts level with P = {forecast.scaling.p}: the same layers, wider. "
            "It was fitted on models trained from scratch."
        )
        yield _why(forecast)
    yield from (f"Note: {note}" for note in forecast.notes)


def _inference(forecast: Forecast) -> Any:
    rows = [
        (
            str(x.p),
            _count(x.adapter_parameters),
            f"{x.weights_gib:.3f}",
            f"{x.kv_cache_gib:.3f}",
            f"{x.activations_gib:.3f}",
            f"{x.memory_gib:.3f}",
            f"{1e3 * x.token_s:.2f}",
            f"{x.latency_s:.3f}",
        )
        for x in forecast.estimates
    ]
    headings = (
        *("P", "adapter\nparams", "weights\nGiB", "KV cache\nGiB", "activations\nGiB"),
        *("memory\nGiB", "ms per\ntoken", "s per\nrequest"),
    )
    asked = f"batch {forecast.batch}, {forecast.input_tokens} tokens in"
    title = f"Inference: {asked}, {forecast.output_tokens} out"
    return _table(title, headings, rows)


def _training(forecast: Forecast) -> Any:
    rows = [
        (
            x.name,
            _count(x.tokens),
            _count(x.learned_parameters),
            f"{x.flops:.1e}",
            duration(x.seconds),
            f"{x.memory_gib:.1f}",
            str(x.micro_batch_size),
            f"{x.fits or 'none'}",
            f"{x.fits_with_checkpointing or 'none'}",
        )
        for x in forecast.training
    ]
    headings = (
        *("training", "tokens", "learned\nparams", "FLOPs", "time", "GiB", "micro-\nbatch"),
        *("largest\nfitting", "with check-\npointing"),
    )
    title = "Training"
    if forecast.processes > 1:
        title += f" on {forecast.processes} GPUs, without the time they wait for each other"
        title += ", each with a part of the backbone" if forecast.sharded else ""
    return _table(title, headings, rows)


def _scaling(forecast: Forecast) -> Any:
    assert forecast.scaling is not None
    found = forecast.scaling
    larger = f"{_count(found.parameters)} parameters"
    rows = [
        (f"P = {found.p}", f"+{found.streams_memory_gib:.3f}", f"+{found.streams_latency_s:.4f}"),
        (larger, f"+{found.scaled_memory_gib:.3f}", f"+{found.scaled_latency_s:.4f}"),
        ("ratio", f"{found.memory_ratio:.1f}x", f"{found.latency_ratio:.1f}x"),
    ]
    headings = ("to the same loss by", "memory\nGiB", "latency\ns")
    return _table("Streams or parameters", headings, rows)


def _why(forecast: Forecast) -> str:
    paper = forecast.paper
    return (
        f"The paper's example (1.6B, P = {PAPER_P}, batch 1) gives {paper.memory_ratio:.0f}x and "
        f"{paper.latency_ratio:.1f}x here, and {paper.paper_memory_ratio:.0f}x and "
        f"{paper.paper_latency_ratio:.0f}x in the paper. The paper takes the mean over "
        f"{', '.join(map(str, PAPER_LENGTHS))} tokens in and out, and a larger model of "
        f"{PAPER_EQUAL / 1e9:.1f}B from its measured losses where its fitted law says 2.9B. So "
        f"computed it is {paper.averaged_memory_ratio:.1f}x and "
        f"{paper.averaged_latency_ratio:.1f}x. Longer texts and larger batches fill the cache of "
        "every stream, and lower both."
    )


def _table(title: str, headings: tuple[str, ...], rows: list[Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), box=SIMPLE_HEAD, show_edge=False, padding=(0, 0))
    for at, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if at else "left")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _count(count: float) -> str:
    """`48`, `553k`, `1.77M`, `3.09B`."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f}{letter}"
    return f"{count / 1e3:.0f}k" if count >= 1e3 else f"{count:.0f}"
