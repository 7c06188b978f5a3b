"""The result as report and card both show it: table, findings, meaning, and what to beware of."""

import re

from recycle.results import (
    COLUMNS,
    CONTROL,
    FIRST_COLUMNS,
    Difference,
    Results,
    first_table,
    format_difference,
    precisions,
    shared_training,
    table,
)

from . import markdown
from .markdown import bullets, escape

HONEST_DOCUMENTS = 64
"""Fewer test documents than this make a trial, not a result."""


def result(results: Results) -> str:
    """The sections on the result, in Markdown."""
    columns = (*COLUMNS[:2], "bits per byte", *COLUMNS[2:])
    rows = [
        (*row[:2], f"{model.bits_per_byte:.4f}", *row[2:])
        for row, model in zip(table(results), results.models, strict=True)
    ]
    return markdown.document(
        "## Result",
        against_the_run(results),
        markdown.table(columns, rows),
        shared_training(results),
        "In nats per token, ± one standard error:",
        bullets(findings(results)),
        "How to read this:",
        bullets(explanations(results)),
        "![Held-out loss against P](loss_vs_streams.png)",
        "## Before you believe it",
        bullets(warnings(results)),
    ).rstrip()


def against_the_run(results: Results) -> str:
    """What measuring the adapters again, mostly in another precision, changes, in Markdown."""
    if results.first is None:
        return ""
    lines = []
    for name, difference in results.minus_first().items():
        side = "as in the run" if difference.mean == 0 else _compare(difference, "run's own loss")
        lines.append(f"**{escape(name)}** is {side}.")
    return markdown.document(
        f"{escape(precisions(results))}. The run that trained them ended on "
        f"{results.first.date:%Y-%m-%d}; its own losses, and what changes:",
        markdown.table(FIRST_COLUMNS, first_table(results)),
        bullets(lines),
        "And this measurement on its own:",
    ).rstrip()


def findings(results: Results) -> list[str]:
    """What each model's difference to the backbone and to the control is, in Markdown."""
    sentences = []
    for model in results.models:
        if model.minus_backbone is None:
            continue
        sentence = f"**{escape(model.name)}** is {_compare(model.minus_backbone, 'backbone')}"
        if model.minus_control is not None:
            sentence += f", and {_compare(model.minus_control, 'control')}"
        sentence += "."
        if model.minus_control is not None and not model.minus_control.distinguishable:
            sentence += " This run does not show that it brings more than prefix tuning does."
        sentences.append(sentence)
    return sentences


def _compare(difference: Difference, other: str) -> str:
    if not difference.distinguishable:
        return f"not distinguishable from the {other} ({format_difference(difference)})"
    side = "below" if difference.mean < 0 else "above"
    return f"{abs(difference.mean):.4f} ± {difference.standard_error:.4f} {side} the {other}"


def explanations(results: Results) -> list[str]:
    """What the rows and columns of the table mean, in Markdown."""
    groups = {document.group for document in results.documents}
    lines = [
        f"Held-out loss: nats per token, over one block of {results.documents[0].tokens} predicted "
        f"tokens from each of {len(results.documents)} test documents ({len(groups)} groups). "
        "Bits per byte: the same loss for each UTF-8 byte of their text.",
        "Differences and their standard errors are paired over documents; below zero is better. "
        "Not distinguishable: less than two standard errors from zero.",
        "**backbone** is the untouched model. P = 1 is the same thing, bit for bit.",
    ]
    if _has_control(results):
        lines.append(
            "**control** is plain prefix tuning: one stream with a prefix, trained on the same "
            "text. What P brings is the difference to it, not to the backbone."
        )
    return lines


def warnings(results: Results) -> list[str]:
    """What a reader has to know before believing the numbers, in Markdown."""
    lines = []
    backbone = results.backbone
    dequantised = re.search(r"[.-](I?Q\d\w*)\.gguf$", backbone.id, re.IGNORECASE)
    if dequantised:
        lines.append(
            f"The backbone is dequantised from {dequantised[1]}: part of a gain can be repair of "
            "quantisation damage, which the original weights do not have."
        )
    if backbone.quantization is not None:
        lines.append(
            f"The backbone was loaded in {escape(backbone.quantization)}: part of a gain can be "
            "repair of quantisation damage."
        )
    if results.data.source == "stdlib":
        lines.append(
            "The text is Python's standard library, which the backbone has likely read in its own "
            "training: results on code that is new to it can differ."
        )
    if not _has_control(results):
        lines.append(
            "No control was trained: these numbers cannot tell what P brings from what prefix "
            "tuning brings."
        )
    if not any(training.tokens for training in results.training):
        lines.append("Nothing was trained: the adapters are as they were initialised.")
    if len(results.documents) < HONEST_DOCUMENTS:
        lines.append(
            f"Only {len(results.documents)} test documents (fewer than {HONEST_DOCUMENTS}): "
            "a trial, not a result."
        )
    lines.append(
        "One run: the standard errors cover the choice of test documents, taken as independent, "
        "and not that of the seed, the training text or the start."
    )
    return lines


def _has_control(results: Results) -> bool:
    return any(model.name == CONTROL for model in results.models)
