"""What a recipe may hold: typed sections."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import kinds

Tokens = Annotated[kinds.Whole, Field(ge=0)]
Warmup = Annotated[kinds.Real, Field(ge=0, le=1)]
Decay = Literal["cosine", "linear", "constant"]


class Section(BaseModel):
    """A part of a recipe: only the fields below, never changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Section):
    """The model that is recycled."""

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
    adapter: kinds.Place | None = None
    """A LoRA that the model was adapted with elsewhere: folder or Hub id. It takes the place of the
    stage adapt."""
    adapter_revision: kinds.Text | None = None
    """Branch, tag or commit of the LoRA on the Hub."""


class Method(Section):
    """How streams are made."""

    init: Literal["text", "random"] = "text"
    """Prefixes start from the keys and values of real text, or from random numbers."""
    num_virtual_tokens: kinds.Count = 48
    """Learned prefix tokens in each stream, n in the paper."""
    smoothing: Annotated[kinds.Real, Field(ge=0, lt=1)] = 0.1
    """Share of the aggregation weights that is spread evenly, ε in the paper."""


class Source(Section):
    """Where documents come from."""

    source: Literal["hub", "files", "jsonl", "parquet", "stdlib", "tasks", "mix"]
    """Hub data set, text files, JSON lines, Parquet files, the source files of Python's standard
    library, small tasks with checkable answers that are made on the spot, or several of these."""
    path: kinds.Place | None = None
    """hub: data set id; files: folder, file or glob; jsonl, parquet: file or glob."""
    subset: kinds.Text | None = None
    """hub: configuration of the data set."""
    split: kinds.Text = "train"
    """hub: split that documents are read from (ours are cut from it)."""
    revision: kinds.Text | None = None
    """hub: branch, tag or commit."""
    format: Literal["text", "chat"] = "text"
    """hub, jsonl, parquet: what a row holds, a text or a conversation. Of conversations only the
    assistant's turns are learned."""
    text_field: kinds.Text = "text"
    """hub, jsonl, parquet: field that holds the text."""
    messages_field: kinds.Text = "messages"
    """hub, jsonl, parquet: field that holds the conversation. Rows of `prompt` and `completion`,
    and ShareGPT's `conversations`, are known by their own names."""
    group_field: kinds.Text | None = None
    """hub, jsonl, parquet: documents that are equal here (same repository) never fall into two
    splits."""
    packages: kinds.Names | None = None
    """stdlib: top-level packages and modules; None is the fixed list in data/files.py."""
    conversations: kinds.Count = 800
    """tasks: how many are made."""


class Part(Source):
    """One of the sources that are mixed."""

    weight: kinds.Rate = 1.0
    """Its share of the training tokens is this over the sum of all weights."""


class Data(Source):
    """The text to learn from and to measure on."""

    mix: dict[kinds.Name, Part] = {}
    """mix: the sources, each under a name of its own."""
    test_path: kinds.Place | None = None
    """files, jsonl, parquet: test documents of your own, read as those of `path` are."""
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
    """How long and how fast is learned: what both stages take unless they say otherwise."""

    tokens: Tokens | None = 20_000_000
    """The whole budget in text tokens, of both stages; 0 keeps the untrained start."""
    batch_size: kinds.Count = 8
    """Blocks in an optimiser step."""
    micro_batch_size: kinds.MicroBatch = 1
    """Blocks in a forward pass; divides batch_size. auto finds out before the training how many fit
    into memory."""
    warmup: Warmup = 0.05
    """Fraction of the steps in which the learning rates rise."""
    decay: Decay = "cosine"
    """How the learning rates fall after the warm-up."""
    max_grad_norm: kinds.Rate = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: kinds.Checkpointing = False
    """Recompute activations in the backward pass: less memory, more time. selective keeps those of
    matrix products and attention: more memory than true, less time."""
    compile: kinds.Flag = False
    """Compile each layer of the decoder for training: a minute more at its start, faster steps."""
    checkpoint_steps: kinds.Count = 50
    """Steps between two checkpoints."""
    validation_steps: kinds.Count = 50
    """Steps between two measurements of the validation loss."""
    seed: kinds.Seed = 0
    """Of everything random in training."""


class Stage(Section):
    """What a stage of its own says in place of `data` and `training`; null takes what these say."""

    data: Data | None = None
    """The text of this stage alone; takes a fragment's name as well."""
    tokens: Tokens | None = None
    """Text tokens that every adapter of this stage learns from."""
    batch_size: kinds.Count | None = None
    """Blocks in an optimiser step."""
    micro_batch_size: kinds.MicroBatch | None = None
    """Blocks in a forward pass, or auto."""
    warmup: Warmup | None = None
    """Fraction of the steps in which the learning rates rise."""
    decay: Decay | None = None
    """How the learning rates fall after the warm-up."""


class Adapt(Stage):
    """The first stage: the backbone's weights learn the text at P = 1. `tokens`: null is 80 % of
    the budget."""

    train: Literal["lora", "full", "none"] = "lora"
    """A LoRA of PEFT, all weights, or nothing."""
    rank: kinds.Count = 16
    """Of the LoRA."""
    alpha: kinds.Count = 32
    """The LoRA's matrices are scaled by alpha / rank."""
    target_modules: kinds.Names = ("all-linear",)
    """Modules that the LoRA enters, by the ends of their names; all-linear is all but the head."""
    learning_rate: kinds.Rate | None = None
    """Of the LoRA, or of all weights."""


class StreamsStage(Stage):
    """The second stage: streams learn on the adapted model. `tokens`: null is what the first stage
    leaves of the budget."""

    train: Literal["prefixes", "all"] = "prefixes"
    """Prefixes and aggregators on frozen weights, or all weights together with them."""
    start: kinds.Place | None = None
    """A family to go on from, folder or Hub id, in place of a start from text or random numbers."""
    nested: kinds.Flag = True
    """One training serves every P (2 is the first two streams of 8), else each has its own."""
    prefix_learning_rate: kinds.Rate | None = None
    """Of the prefixes of the streams."""
    aggregator_learning_rate: kinds.Rate | None = None
    """Of the aggregators."""
    control_learning_rate: kinds.Rate | None = None
    """Of the control's prefix."""
    weights_learning_rate: kinds.Rate | None = None
    """Of all other weights, where all learn."""
    loss_weights: dict[kinds.Whole, Annotated[kinds.Real, Field(ge=0)]] = {}
    """Weight of each P in the loss of a nested family; 1 where not given."""
    at_once: kinds.Count | None = None
    """Streams whose activations are held at once, null is all: less memory, more time. Where
    micro_batch_size is auto and one block does not fit, it is found as well."""
    own_loss: Annotated[kinds.Real, Field(ge=0, le=1)] = 0.0
    """Share of the loss that is the mean of what each stream alone would have."""
    control: kinds.Flag = True
    """Train the control as well."""


class Stages(Section):
    """The two stages of a run, in their order."""

    adapt: Adapt = Adapt()
    streams: StreamsStage = StreamsStage()


class Evaluation(Section):
    """The final comparison."""

    compare: kinds.Compared = ()
    """Further rows: lora is a fresh LoRA of the first stage's rank on the untouched backbone, or
    all weights where the run trains all, on the tokens of both stages."""
    compare_learning_rate: kinds.Rate | None = None
    """Of that row; null is as in the first stage."""
    batch_size: kinds.Count = 4
    """Blocks in a forward pass."""
    speed: kinds.Flag = True
    """Measure prefill and decode speed."""
    prompt_tokens: kinds.Count = 256
    """Prompt length of the speed measurement."""
    new_tokens: kinds.Count = 16
    """Tokens decoded in it."""
    samples: Annotated[kinds.Whole, Field(ge=0)] = 3
    """Prompts from the test documents that every row goes on with, for the report; 0 is none."""


class Launch(Section):
    """Where it runs; no part of a recipe's identity."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a CUDA GPU where there is one, else Apple's (mps, untested), else the CPU."""
    processes: kinds.Count | None = None
    """Processes that share the work on this machine; null is one for each GPU. The batch stays."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Every process holds the whole backbone (ddp), or a part of it (fsdp); auto takes fsdp where
    the whole does not fit on a GPU."""


class Output(Section):
    """Where the run folder lies; no part of a recipe's identity."""

    dir: kinds.Place | None = None
    """Run folder; None is runs/<name>."""


class Logging(Section):
    """What is written down on the way; no part of a recipe's identity."""

    steps: kinds.Count = 1
    """Steps between two lines of the training log."""
    to: Literal["trackio", "tensorboard", "wandb", "none"] = "none"
    """Also track the training there: trackio and tensorboard in the run folder's logs/, wandb on
    its own server."""


class Recipe(Section):
    """Everything that decides a run."""

    name: kinds.Name
    """Names the run folder."""
    backbone: Backbone
    streams: kinds.Streams
    """The numbers of streams, P, to make adapters for, in rising order."""
    method: Method = Method()
    data: Data
    training: Training = Training()
    stages: Stages = Stages()
    evaluation: Evaluation = Evaluation()
    launch: Launch = Launch()
    output: Output = Output()
    logging: Logging = Logging()
