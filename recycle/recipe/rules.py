"""Rules between the fields of a recipe."""

from collections.abc import Iterator, Mapping
from typing import Any

from .fields import FORMATS, SOURCES, belongs
from .schema import Data, Part

Broken = tuple[list[str], str]
"""The keys concerned, and what the rule is."""


def contradictions(values: Mapping[str, Any], chosen: set[str]) -> Iterator[Broken]:
    """Rules that are broken; one is skipped where a value that it needs is absent.

    Args:
        values: Dotted key -> typed value.
        chosen: The keys that were set rather than left at their default.
    """
    for stage in ("adapt", "streams"):
        keys = [
            f"{place}.{name}"
            for name in ("micro_batch_size", "batch_size")
            for place in (f"stages.{stage}", "training")
            if values.get(f"{place}.{name}") is not None
        ]
        micro, batch = (
            next((k for k in keys if k.endswith(f".{name}")), None)
            for name in ("micro_batch_size", "batch_size")
        )
        if micro and batch and values[micro] != "auto" and values[batch] % values[micro]:
            yield [micro, batch], "micro_batch_size must divide batch_size"
            break
    at_once, streams = values.get("stages.streams.at_once"), values.get("streams")
    if at_once and streams and at_once > max(streams):
        rule = "at_once is at most the largest number of streams"
        yield ["stages.streams.at_once", "streams"], rule
    yield from _budget(values, chosen)
    yield from _trained(values)
    yield from _loss_weights(values)
    for key in values:
        section, _, name = key.rpartition(".")
        if name == "source":
            yield from _source(section, values, chosen)
    backbone_id = values.get("backbone.id", "")
    if backbone_id.startswith("package://") and values.get("backbone.revision") is not None:
        yield ["backbone.revision", "backbone.id"], "only a model on the Hub has a revision"


def _budget(values: Mapping[str, Any], chosen: set[str]) -> Iterator[Broken]:
    """Of the budget and the two stages' tokens, one follows from the two others."""
    budget, stages = "training.tokens", ["stages.adapt.tokens", "stages.streams.tokens"]
    total, given = values.get(budget), {x: values[x] for x in stages if values.get(x) is not None}
    if values.get("stages.adapt.train") == "none":
        if given.pop(stages[0], 0):
            yield [stages[0], "stages.adapt.train"], "a stage that is left out takes no tokens"
        stages = stages[1:]
    if total is None:
        if len(given) < len(stages) and budget in values:
            yield [budget], f"null needs {' and '.join(stages)}"
    elif len(given) == 2 and budget in chosen and sum(given.values()) != total:
        rule = "the budget is what both stages take; set one stage and the budget, or both stages"
        yield [budget, *stages], f"{rule} and {budget}=null"
    elif len(stages) == 2 and len(given) == 1 and max(given.values()) > total:
        yield [*given, budget], "a stage takes at most the whole budget"


def _trained(values: Mapping[str, Any]) -> Iterator[Broken]:
    """What each stage trains, and on what."""
    adapt, streams = values.get("stages.adapt.train"), values.get("stages.streams.train")
    for key in ("backbone.adapter", "stages.streams.start"):
        if values.get(key) is not None and adapt in ("lora", "full"):
            rule = "it brings the adapted weights with it, which takes stages.adapt.train: none"
            yield [key, "stages.adapt.train"], rule
    if values.get("backbone.adapter") and values.get("stages.streams.start"):
        yield ["backbone.adapter", "stages.streams.start"], "a family stands on its own LoRA"
    for key, train in (("stages.adapt.train", adapt), ("stages.streams.train", streams)):
        if train in ("full", "all") and values.get("backbone.quantization") is not None:
            rule = "quantised weights cannot learn; take lora and prefixes, or quantization: none"
            yield [key, "backbone.quantization"], rule
    if streams != "all":
        return
    if values.get("stages.streams.control"):
        rule = "the control is a prefix on frozen weights; compare with evaluation.compare: [lora]"
        yield ["stages.streams.control", "stages.streams.train"], rule
    if values.get("stages.streams.nested") is False and len(values.get("streams", ())) > 1:
        rule = "all weights learn for every P together: nest them, or take one number of streams"
        yield ["stages.streams.nested", "streams"], rule


def _loss_weights(values: Mapping[str, Any]) -> Iterator[Broken]:
    streams, mapping = values.get("streams"), "stages.streams.loss_weights"
    weights = [key for key in values if key.startswith(f"{mapping}.")]
    for key in weights:
        if streams and int(key.rpartition(".")[2]) not in streams:
            rule = "only the numbers in streams have a weight in the loss (null drops them all)"
            yield [key, "streams"], rule
    if weights and values.get("stages.streams.nested") is False:
        rule = "weights share out one loss; without nesting each P has a training of its own"
        yield [*weights, "stages.streams.nested"], rule
    if streams and all(values.get(f"{mapping}.{p}", 1) == 0 for p in streams):
        yield weights, "at least one weight must be over 0, or nothing is learned"


def _source(section: str, values: Mapping[str, Any], chosen: set[str]) -> Iterator[Broken]:
    """What belongs to the source of a data section, and what it needs."""
    source, format = values[f"{section}.source"], values.get(f"{section}.format", "text")
    is_part = section.rpartition(".")[0].endswith("mix")
    fields = Part.model_fields if is_part else Data.model_fields
    takes = [name for name in fields if belongs(name, source, format)]
    for name in fields:
        key = f"{section}.{name}"
        entries = [k for k in chosen if k == key or (name == "mix" and k.startswith(f"{key}."))]
        if name in takes or not entries or values.get(entries[0]) is None:
            continue
        if source in SOURCES[name]:
            rule = f"{name} belongs to format {FORMATS[name]}"
            yield [key, f"{section}.format"], rule
            continue
        rule = f"{name} belongs to {' and '.join(SOURCES[name])}; {source} takes {', '.join(takes)}"
        replace = f"({section}=NAME on the command line replaces the whole section)"
        yield [sorted(entries)[0], f"{section}.source"], f"{rule} {replace}"
    if "path" in takes and values.get(f"{section}.path", "") is None:
        yield [f"{section}.source"], f"{source} needs {section}.path"
    if source == "mix" and is_part:
        yield [f"{section}.source"], "what is mixed is no mix itself"
    elif source == "mix" and not any(key.startswith(f"{section}.mix.") for key in values):
        yield [f"{section}.source"], f"a mix needs parts; write {section}.mix.NAME: FRAGMENT"
