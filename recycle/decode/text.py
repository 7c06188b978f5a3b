"""Text from a finished run, streamed to standard output."""

from typing import Any

import torch
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase, TextStreamer

from recycle.backbone import BackboneError, load_tokenizer
from recycle.backbone.generation import decoding
from recycle.backbone.source import TOKENIZER_FILES
from recycle.errors import RecycleError
from recycle.family import Family
from recycle.family.adapters import find_backbone, load
from recycle.family.folder import find_folder, read_members


class DecodeError(RecycleError):
    """Text cannot be generated from this prompt."""


class Printer(TextStreamer):
    """Prints a text as it was given, once decoding starts, and then what is decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt = prompt

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:  # after messages of compilation
            print(self.prompt, end="", flush=True)
        super().put(value)


def generate_text(
    source: str,
    prompt: str,
    p: int | None,
    max_new_tokens: int,
    chat: bool,
    backbone: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    compile: bool | None = None,
) -> None:
    """Go on with a prompt, and print the text as it comes.

    Runs on a GPU where there is one, in the arithmetic that the adapters were trained in.

    Args:
        source: A run folder, an adapter folder or a Hub id.
        prompt: The text to go on with.
        p: Streams; None is the most that there are.
        max_new_tokens: At most so many tokens.
        chat: The prompt is a user's message in the tokenizer's chat template.
        backbone: Where the backbone lies now, if not where the adapters recorded it.
        temperature: Of sampling; 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that hold this share of the probability.
        seed: Of sampling; None is another one each time.
        compile: See `recycle.load`.

    Raises:
        DecodeError: The prompt is no text, has no tokens or too many, or there is no chat template.
        FamilyError, BackboneError: See `recycle.load`; or there is no tokenizer.
    """
    if prompt.encode("utf-8", "replace").decode() != prompt:
        raise DecodeError("The prompt is not text in UTF-8.")
    tokenizer = find_tokenizer(source, backbone)
    if chat and tokenizer.chat_template is None:
        raise DecodeError(f"The tokenizer of {source} has no chat template; leave out --chat.")
    text = prompt
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise DecodeError("The prompt has no tokens; give some text with --prompt.")
    model = load_here(source, p, backbone, compile)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and ids.shape[1] + max_new_tokens > window:
        raise DecodeError(
            f"The prompt and --max-new-tokens come to {ids.shape[1] + max_new_tokens} tokens, and "
            f"the backbone's window is {window}. Shorten one of them."
        )
    streamer = Printer(tokenizer, "" if chat else prompt)
    ids = ids.to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    with decoding(model, temperature, top_p):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )


def load_here(
    source: str, p: int | None, backbone: str | None, compile: bool | None = None
) -> PeftModelForCausalLM:
    """`recycle.load` onto the GPU where there is one."""
    placement: dict[str, Any] = {}
    if torch.cuda.is_available():
        placement["device_map"] = {"": "cuda"}
    return load(source, p, backbone=backbone, compile=compile, **placement)


def find_tokenizer(source: str, backbone: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a run's folder or, where that has none, the backbone's.

    Raises:
        FamilyError, BackboneError: There is none, or no family.
    """
    folder = find_folder(source, None)
    if any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return load_tokenizer(str(folder))
    config = read_members(folder, Family.read(folder))[0].config
    files = find_backbone(folder, config, source, backbone)
    try:
        return load_tokenizer(files.folder)
    except BackboneError as error:
        raise BackboneError(f"neither {source} nor its backbone has a tokenizer: {error}") from None
