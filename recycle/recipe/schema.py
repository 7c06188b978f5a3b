"""What a recipe may hold: typed sections, and the rules between them."""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from . import kinds


class Section(BaseModel):
    """A part of a recipe: only the fields below, never changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Section):
    """The frozen model that is recycled."""

    id: kinds.BackboneId
    """Hub id, model folder, or `package://PACKAGE/FILE.gguf` for a file inside a Python package."""
    revision: kinds.Text | None = None
    """Branch, tag or commit on the Hub; None is its newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights, and the one that quantised weights compute in; auto is
    bfloat16 where the hardware computes in it, else float32. What is trained is float32."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention code of transformers; auto is sdpa where it has that for the model, else eager."""
    quantization: kinds.Quantization = None
    """bitsandbytes format of the frozen weights; nf4 is doubly quantised. none is null."""


class Method(Section):
    """How streams are made."""

    nested: kinds.Flag = True
    """One training run serves every P (2 is the first two streams of 8), else each has its own."""
    init: Literal["text", "random"] = "text"
    """Prefixes start from the keys and values of real text, or from random numbers."""
    num_virtual_tokens: kinds.Count = 48
    """Learned prefix tokens in each stream, n in the paper."""
    smoothing: Annotated[kinds.Real, Field(ge=0, lt=1)] = 0.1
    """Share of the aggregation weights that is spread evenly, ε in the paper."""


class Data(Section):
    """The text to learn from and to measure on."""

    source: Literal["hub", "files", "jsonl", "stdlib"]
    """Hub data set, text files, JSON lines, or the source files of Python's standard library."""
    path: kinds.Place | None = None
    """hub: data set id; files: folder, file or glob; jsonl: file or glob."""
    subset: kinds.Text | None = None
    """hub: configuration of the data set."""
    split: kinds.Text = "train"
    """hub: split that documents are read from (ours are cut from it)."""
    revision: kinds.Text | None = None
    """hub: branch, tag or commit."""
    text_field: kinds.Text = "text"
    """hub, jsonl: field that holds the text."""
    group_field: kinds.Text | None = None
    """hub, jsonl: documents that are equal here (same repository) never fall into two splits."""
    packages: kinds.Packages | None = None
    """stdlib: top-level packages and modules; None is the fixed list in data/files.py."""
    block_size: kinds.AtLeastTwo = 512
    """Tokens in a block."""
    validation_documents: kinds.AtLeastTwo = 16
    """Documents that choices look at."""
    test_documents: kinds.AtLeastTwo = 64
    """Documents that only the final comparison reads; an honest result needs 64. They are drawn
    first: another number moves documents between test and validation."""
    seed: kinds.Seed = 0
    """Of the split and the order."""


class Training(Section):
    """What is learned, for how long and how fast."""

    tokens: Annotated[kinds.Whole, Field(ge=0)] = 20_000_000
    """Text tokens that every adapter learns from; 0 keeps the untrained start."""
    batch_size: kinds.Count = 8
    """Blocks in an optimiser step."""
    micro_batch_size: kinds.Count = 1
    """Blocks in a forward pass; divides batch_size."""
    prefix_learning_rate: kinds.Rate
    """Of the prefixes of the streams."""
    aggregator_learning_rate: kinds.Rate
    """Of the aggregators."""
    control_learning_rate: kinds.Rate
    """Of the control's prefix."""
    warmup: Annotated[kinds.Real, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps in which the learning rates rise."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rates fall after the warm-up."""
    max_grad_norm: kinds.Rate = 1.0
    """Gradients are clipped to this norm."""
    loss_weights: dict[kinds.Whole, Annotated[kinds.Real, Field(ge=0)]] = {}
    """Weight of each P in the loss of a nested family; 1 where not given."""
    control: kinds.Flag = True
    """Train the control as well."""
    gradient_checkpointing: kinds.Flag = False
    """Recompute activations in the backward pass: less memory, more time."""
    checkpoint_steps: kinds.Count = 50
    """Steps between two checkpoints."""
    validation_steps: kinds.Count = 50
    """Steps between two measurements of the validation loss."""
    seed: kinds.Seed = 0
    """Of everything random in training."""


class Evaluation(Section):
    """The final comparison."""

    batch_size: kinds.Count = 4
    """Blocks in a forward pass."""
    speed: kinds.Flag = True
    """Measure prefill and decode speed."""
    prompt_tokens: kinds.Count = 256
    """Prompt length of the speed measurement."""
    new_tokens: kinds.Count = 16
    """Tokens decoded in it."""


class Launch(Section):
    """Where it runs; no part of a recipe's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""


class Output(Section):
    """Where the run folder lies; no part of a recipe's identity."""

    dir: kinds.Place | None = None
    """Run folder; None is runs/<name>."""


class Logging(Section):
    """What is written down on the way; no part of a recipe's identity."""

    steps: kinds.Count = 1
    """Steps between two lines of the training log."""


class Recipe(Section):
    """Everything that decides a run."""

    name: kinds.Name
    """Names the run folder."""
    backbone: Backbone
    streams: kinds.Streams
    """The numbers of streams, P, to make adapters for, in rising order."""
    method: Method = Method()
    data: Data
    training: Training
    evaluation: Evaluation = Evaluation()
    launch: Launch = Launch()
    output: Output = Output()
    logging: Logging = Logging()


# Which sources a field of `data` belongs to; fields that are not here belong to all.
SOURCES = {
    "path": ("hub", "files", "jsonl"),
    "subset": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "text_field": ("hub", "jsonl"),
    "group_field": ("hub", "jsonl"),
    "packages": ("stdlib",),
}


def _fields(model: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _fields(kind, f"{name}.")
        else:
            yield prefix + name, info


FIELDS = dict(_fields(Recipe))  # every field that holds a value, by dotted key
SECTIONS = tuple(name for name in Recipe.model_fields if name not in FIELDS)
MAPPINGS = tuple(key for key, info in FIELDS.items() if get_origin(info.annotation) is dict)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by dotted key, in the order of the schema.

    Fields that do not belong to the recipe's data source are left out; a mapping gives one key
    for each of its entries, `training.loss_weights.4`, and itself where it is empty.
    """
    values: dict[str, Any] = {}
    for key in FIELDS:
        value = attrgetter(key)(recipe)
        if key in MAPPINGS and value:
            values |= {f"{key}.{item}": value[item] for item in sorted(value)}
        elif belongs(key, recipe.data.source):
            values[key] = value
    return values


def belongs(key: str, source: str) -> bool:
    """Whether the field with this dotted key does anything for this data source."""
    section, _, name = key.partition(".")
    return section != "data" or source in SOURCES.get(name, (source,))


def contradictions(values: Mapping[str, Any], chosen: set[str]) -> Iterator[tuple[list[str], str]]:
    """Rules between fields that are broken, as (keys concerned, what the rule is).

    Args:
        values: dotted key -> typed value; a rule is skipped where a value it needs is absent.
        chosen: the keys that were set rather than left at their default.
    """
    batch, micro = values.get("training.batch_size"), values.get("training.micro_batch_size")
    if batch and micro and batch % micro:
        keys = ["training.micro_batch_size", "training.batch_size"]
        yield keys, "micro_batch_size must divide batch_size"

    streams = values.get("streams")
    weights = {key: values[key] for key in values if key.startswith("training.loss_weights.")}
    for key in weights:
        if streams and int(key.rpartition(".")[2]) not in streams:
            rule = "only the numbers in streams have a weight in the loss (null drops them all)"
            yield [key, "streams"], rule
    if weights and values.get("method.nested") is False:
        rule = "weights share out one loss; without nesting each P has a training of its own"
        yield [*weights, "method.nested"], rule
    if streams and all(values.get(f"training.loss_weights.{p}", 1) == 0 for p in streams):
        yield list(weights), "at least one weight must be over 0, or nothing is learned"

    source = values.get("data.source")
    takes = [name for name in Data.model_fields if source and belongs(f"data.{name}", source)]
    for name, sources in SOURCES.items() if source else ():
        key = f"data.{name}"
        if source not in sources and key in chosen and values.get(key) is not None:
            rule = f"{name} belongs to {' and '.join(sources)}; {source} takes {', '.join(takes)}"
            replace = "(data=NAME on the command line replaces the whole section)"
            yield [key, "data.source"], f"{rule} {replace}"
    if "path" in takes and values.get("data.path", "") is None:
        yield ["data.source"], f"{source} needs data.path"

    backbone_id = values.get("backbone.id", "")
    if backbone_id.startswith("package://") and values.get("backbone.revision") is not None:
        yield ["backbone.revision", "backbone.id"], "only a model on the Hub has a revision"
