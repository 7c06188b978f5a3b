"""Which row to deploy: what each costs in memory and time, and which is worth its price."""

import math

from recycle.results import (
    ADAPTED,
    BACKBONE,
    CONTROL,
    LORA,
    Difference,
    ModelResult,
    Results,
    format_difference,
    paired_difference,
)

from .markdown import escape, format_table, join_blocks
from .result import HONEST_DOCUMENTS

CONTEXT = 2048
"""Tokens in the key-value cache for which memory is given."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5, "fp4": 0.5}
"""Of a weight in memory; the scales of quantised weights are left out."""


def memory_gib(results: Results) -> dict[str, float]:
    """GiB of weights and of the cache of `CONTEXT` tokens for each row, by its name.

    Weights that were trained are merged into the backbone and cost nothing more; beside a quantised
    backbone they stay on their own. Empty where it is not known what quantised weights take.
    """
    backbone = results.backbone
    width, stored = BYTES.get(backbone.dtype), BYTES.get(backbone.quantization or backbone.dtype)
    # Embeddings are not quantised.
    quantised = backbone.quantization is not None
    if width is None or stored is None or (quantised and not backbone.non_embedding_parameters):
        return {}
    inner = backbone.non_embedding_parameters or backbone.parameters
    weights = inner * stored + (backbone.parameters - inner) * width
    rows = {row.name: row for row in results.models}
    beside = rows[ADAPTED].adapter_parameters if quantised and ADAPTED in rows else 0
    found = {}
    for row in results.models:
        own = 0 if _bare(row) else row.adapter_parameters
        if own > backbone.parameters:  # all weights learned with the streams
            own -= backbone.parameters
        lora = 0 if row.name == BACKBONE else beside
        cache = row.kv_bytes_per_token * CONTEXT
        found[row.name] = (weights + (own + lora) * width + cache) / 2**30
    return found


def seconds_per_token(results: Results) -> dict[str, float]:
    """Seconds of a step of decoding at batch 1 for each row that has any, by its name.

    Measured in the run where it was, else as estimated. A row without a prefix takes what any other
    without one takes: they are one model with other weights.
    """
    speeds = {x.name: x.speed.decode_tokens_per_second for x in results.models}
    found = {name: 1 / speed for name, speed in speeds.items() if speed}
    if not found and results.estimates is not None:
        by_p = {x.p: x.token_s for x in results.estimates.estimates}
        return {x.name: by_p[x.num_streams] for x in results.models if x.num_streams in by_p}
    bare = [found[x.name] for x in results.models if _bare(x) and x.name in found]
    for row in results.models:
        if _bare(row) and bare:
            found.setdefault(row.name, bare[0])
    return found


def recommend(results: Results) -> tuple[ModelResult | None, str]:
    """The row to deploy and why, in Markdown; None where no loss is finite.

    It is the cheapest of the rows than which none is better by two paired standard errors.
    """
    rows = sorted(results.models, key=lambda x: (x.num_streams, x.name == CONTROL))
    rows = [row for row in rows if math.isfinite(row.loss)]
    if not rows:
        return None, "No row has a finite loss, so there is none to recommend."
    tokens = results.tokens

    def minus(row: ModelResult, other: ModelResult) -> Difference:
        return paired_difference(row.losses, other.losses, tokens)

    def beaten(row: ModelResult) -> bool:
        differences = (minus(other, row) for other in rows if other is not row)
        return any(x.mean < 0 and x.distinguishable for x in differences)

    chosen = next(row for row in rows if not beaten(row))
    place = rows.index(chosen)
    text = f"**Deploy {_named(chosen)}.**"
    if chosen.num_streams == 1:
        text = f"**Deploy {_named(chosen)}: no P above 1 is worth its price here.**"
    text += " It is the cheapest row than which none is clearly better."
    if place:
        best = min(rows[:place], key=lambda x: x.loss)
        text += (
            f" Its held-out loss is {chosen.loss:.4f}; to {_named(best)}, the best of what costs "
            f"less or the same, that is {format_difference(minus(chosen, best))}"
        )
        text += _price(results, chosen)
    for row in rows[place + 1 :]:
        if row.num_streams > 1:
            difference = minus(row, chosen)
            how = "clearly worse" if difference.distinguishable else "not clearly better"
            text += (
                f" {escape(row.name)} costs more and is {how} ({format_difference(difference)})."
            )
    count = len(results.documents)
    if count < HONEST_DOCUMENTS:
        text += f" But this is a trial, of {count} test documents: do not decide by it."
    return chosen, text


def _named(row: ModelResult) -> str:
    return f"the {row.name}" if row.name in (BACKBONE, CONTROL) else escape(row.name)


def _price(results: Results, chosen: ModelResult) -> str:
    """The rest of the sentence: what a row takes beside the backbone."""
    shares = [
        f"{prices[chosen.name] / prices[BACKBONE]:.2f} times the backbone's {what}"
        for what, prices in (
            ("memory", memory_gib(results)),
            ("time to decode a token", seconds_per_token(results)),
        )
        if chosen.name in prices and BACKBONE in prices
    ]
    return f"; it takes {' and '.join(shares)}." if shares else "."


def render_deployment(results: Results) -> str:
    """The section, in Markdown."""
    memory, seconds = memory_gib(results), seconds_per_token(results)
    chosen, why = recommend(results)
    columns: dict[str, list[str]] = {
        "row": [f"{x.name}{', recommended' * (x is chosen)}" for x in results.models],
        "held-out loss": [f"{x.loss:.4f}" for x in results.models],
    }
    for heading, prices, form in (("GiB", memory, ".3f"), ("ms a token", seconds, ".2f")):
        if prices:
            scale = 1000 if prices is seconds else 1
            cells = [prices.get(x.name) for x in results.models]
            columns[heading] = ["–" if x is None else f"{scale * x:{form}}" for x in cells]
            base = prices.get(BACKBONE)
            if base:
                columns[f"× {heading}"] = ["–" if x is None else f"{x / base:.2f}" for x in cells]
    return join_blocks(
        "## Which P to deploy",
        why,
        "Rows by price: P = 1 without and with trained weights, the control, then rising P. "
        "Clearly better: by two paired standard errors.",
        format_table([tuple(columns), *zip(*columns.values(), strict=True)]),
        _memory_note(results)
        if memory
        else "Memory is not given: the record does not tell what weights in "
        f"{escape(results.backbone.quantization or results.backbone.dtype)} take.",
        _time_note(results)
        if seconds
        else "Time is not given: neither measured (`evaluation.speed=true`) nor estimated.",
        "![Held-out loss against memory](loss_vs_memory.png)" if memory else "",
        "![Held-out loss against the time to decode a token](loss_vs_latency.png)"
        if seconds
        else "",
    ).rstrip()


def _memory_note(results: Results) -> str:
    text = (
        f"Memory, computed: the weights, the adapters, and a key-value cache of {CONTEXT:,} tokens."
    )
    if results.backbone.quantization is not None:
        text += " Scales of quantised weights are not counted."
    if any(x.name in (ADAPTED, LORA) for x in results.models):
        text += " Trained weights are merged into the backbone's" + (
            " in full precision; beside a quantised backbone they are counted on their own."
            if results.backbone.quantization
            else " and cost nothing more."
        )
    return text


def _time_note(results: Results) -> str:
    if any(x.speed.decode_tokens_per_second for x in results.models):
        where = results.hardware.gpu or results.hardware.cpu
        return (
            f"Time, measured at batch 1 on {escape(where)}. Rows without a prefix that were not "
            "measured take what the others without one take."
        )
    assert results.estimates is not None
    return (
        f"Time, not measured but estimated for {escape(results.estimates.gpu)} at batch "
        f"{results.estimates.batch}; the control as P = 1."
    )


def render_estimates(results: Results) -> str:
    """What inference was estimated to take before the run, in Markdown."""
    known = results.estimates
    if known is None:
        return ""
    headings = ("P", "adapter params", "weights", "cache", "activations", "together (GiB)")
    times = ("prefill (ms)", "a token (ms)", "whole request (s)")
    rows = [
        (
            *(str(x.p), f"{x.adapter_parameters:,}", f"{x.weights_gib:.3f}"),
            *(f"{x.kv_cache_gib:.3f}", f"{x.activations_gib:.3f}", f"{x.memory_gib:.3f}"),
            *(f"{1000 * x.prefill_s:.1f}", f"{1000 * x.token_s:.2f}", f"{x.latency_s:.2f}"),
        )
        for x in known.estimates
    ]
    return join_blocks(
        "## Inference as estimated",
        f"On {escape(known.gpu)} in {escape(known.dtype)}, announced before the run and not "
        f"measured: batch {known.batch}, {known.input_tokens:,} tokens read and "
        f"{known.output_tokens:,} written.",
        format_table([(*headings, *times), *rows]),
    ).rstrip()


def _bare(row: ModelResult) -> bool:
    """Whether a row has neither streams nor a prefix."""
    return row.num_streams == 1 and row.name != CONTROL
