"""The result, as report and card both show it: table, findings, how to read it, warnings."""

import math
import re

from recycle.results import (
    ADAPTED,
    CONTROL,
    LORA,
    WEIGHTS,
    Difference,
    Results,
    format_difference,
    precisions,
    shared_training,
    tabulate,
    tabulate_again,
)

from .markdown import bullets, escape, format_table, join_blocks
from .streams import warn_of_streams

HONEST_DOCUMENTS = 64
"""With fewer test documents a run is a trial, not a result."""


def render_result(results: Results) -> str:
    """The sections on the result, in Markdown."""
    bits = ["bits per byte", *(f"{model.bits_per_byte:.4f}" for model in results.models)]
    rows = [(*x[:2], y, *x[2:]) for x, y in zip(tabulate(results), bits, strict=True)]
    return join_blocks(
        "## Result",
        compare_with_the_run(results),
        format_table(rows),
        shared_training(results),
        "In nats per token:",
        bullets(state_findings(results)),
        "How to read this:",
        bullets(explain_table(results)),
        "![What each P brings](loss_vs_streams.png)",
        "## Before you believe it",
        bullets(list_warnings(results)),
    ).rstrip()


def compare_with_the_run(results: Results) -> str:
    """What a later measurement changes, in Markdown; nothing where this is the run's own."""
    if results.first is None:
        return ""
    lines = []
    for name, difference in results.minus_first().items():
        changed = difference.mean != 0
        side = _compare(difference, "run's own loss") if changed else "the same as in the run"
        lines.append(f"**{escape(name)}** is {side}.")
    return join_blocks(
        f"{escape(precisions(results))}. The run that trained them ended on "
        f"{results.first.date:%Y-%m-%d}; its own losses, and what changes:",
        format_table(tabulate_again(results)),
        bullets(lines),
        "And this measurement on its own:",
    ).rstrip()


def state_findings(results: Results) -> list[str]:
    """Each model against the backbone and the control, one sentence or two each, in Markdown."""
    sentences = []
    for model in results.models:
        if model.minus_backbone is None:
            continue
        sentence = f"**{escape(model.name)}** is {_compare(model.minus_backbone, 'backbone')}"
        if model.minus_control is not None:
            sentence += f", and {_compare(model.minus_control, 'control')}"
            if not model.minus_control.distinguishable and model.num_streams > 1:
                sentence += ". This run does not show that it is better than plain prefix tuning"
        if model.minus_weights is not None:
            alone = next(x.name for x in results.models if x.name in (LORA, WEIGHTS))
            sentence += f"; on the same tokens it is {_compare(model.minus_weights, alone)}"
        if model.right is not None:
            sentence += f". It answers {sum(model.right)} of {len(model.right)} right"
        sentences.append(f"{sentence}.")
    return sentences


def _compare(difference: Difference, other: str) -> str:
    if not difference.distinguishable:
        return f"not clearly different from the {other} ({format_difference(difference)})"
    side = "better" if difference.mean < 0 else "worse"
    return f"{format_difference(difference)[1:]} {side} than the {other}"


def explain_table(results: Results) -> list[str]:
    """How to read the table, in Markdown."""
    groups = {document.group for document in results.documents}
    tokens = sorted({document.tokens for document in results.documents})
    length = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    lines = [
        f"Held-out loss: nats per token, over {length} predicted tokens of "
        f"each of {len(results.documents)} test documents ({len(groups)} groups). Lower is better. "
        "Bits per byte: the same loss, per UTF-8 byte of the text.",
        "± is one standard error over documents, each with the weight of its tokens. Differences "
        "are taken document by document; below zero is better. Not clearly different: less than "
        "two standard errors from zero.",
    ]
    names = [model.name for model in results.models]
    if ADAPTED in names:
        lines.append(
            "**backbone** is the untouched model. **P = 1** is the model that the streams were put "
            "on: the backbone with the weights that the first stage adapted, and no stream."
        )
    else:
        lines.append("**backbone** is the untouched model. P = 1 is the same, bit for bit.")
    if alone := next((name for name in names if name in (LORA, WEIGHTS)), None):
        lines.append(
            f"**{alone}** is what training weights alone does with the tokens of both stages, at "
            "P = 1 and no more cost in inference than the backbone. Tokens are equal in all rows; "
            "the columns of seconds and FLOPs tell what they took in training, all stages behind a "
            "row together."
        )
    if _has_control(results):
        lines.append(
            "**control** is plain prefix tuning: one stream with a prefix, trained on the same "
            "text. What P brings is the difference to the control, not to the backbone."
        )
    return lines


def list_warnings(results: Results) -> list[str]:
    """What to know before believing the numbers, in Markdown."""
    lines = []
    backbone = results.backbone
    if broken := [model.name for model in results.models if not math.isfinite(model.loss)]:
        lines.append(
            f"The loss of {escape(', '.join(broken))} is not finite, so there is nothing to "
            "compare it with."
        )
    dequantised = re.search(r"[.-](I?Q\d\w*)\.gguf$", backbone.id, re.IGNORECASE)
    if dequantised:
        lines.append(
            f"The backbone was stored in {dequantised[1]} and lost precision there. Part of a gain "
            "can be repair of that loss, and the original weights would not gain it."
        )
    if backbone.quantization is not None:
        lines.append(
            f"The backbone was loaded in {escape(backbone.quantization)} and lost precision there. "
            "Part of a gain can be repair of that loss."
        )
    if results.data.source == "stdlib":
        lines.append(
            "The text is Python's standard library. The backbone has likely read it in its own "
            "training; on code that is new to it, results can differ."
        )
    if not _has_control(results):
        lines.append(
            "No control was trained. These numbers cannot tell what P brings from what plain "
            "prefix tuning brings."
        )
    if not any(training.tokens for training in results.training):
        lines.append("Nothing was trained: the adapters are as they were initialised.")
    lines += warn_of_streams(results)
    count = len(results.documents)
    if count < HONEST_DOCUMENTS:
        lines.append(
            f"Only {count} test document{'s' * (count > 1)} (fewer than {HONEST_DOCUMENTS}): "
            f"this is a trial, not a result.{' One gives no standard error.' * (count == 1)}"
        )
    lines.append(
        "This is one run. The standard errors say how much the choice of test documents matters, "
        "as if these were independent; another seed, training text or start can change more."
    )
    return lines


def _has_control(results: Results) -> bool:
    return any(model.name == CONTROL for model in results.models)
