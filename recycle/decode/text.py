"""Text from a finished run, streamed to standard output."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from recycle.backbone import BackboneError, load_tokenizer
from recycle.backbone.generation import greedy_decoding
from recycle.backbone.source import TOKENIZER_FILES
from recycle.errors import RecycleError
from recycle.family import Family
from recycle.family.adapters import find_backbone, load
from recycle.family.folder import find_folder, read_members


class DecodeError(RecycleError):
    """Text cannot be generated from this prompt."""


def generate_text(
    source: str,
    prompt: str,
    p: int | None,
    max_new_tokens: int,
    chat: bool,
    backbone: str | None = None,
) -> None:
    """Go on with a prompt, greedily, and print the text as it comes.

    Runs on a GPU where there is one, in the arithmetic that the adapters were trained in.

    Args:
        source: A run folder, an adapter folder or a Hub id.
        prompt: The text to go on with.
        p: Streams; None is the most that there are.
        max_new_tokens: At most so many tokens.
        chat: The prompt is a user's message in the tokenizer's chat template.
        backbone: Where the backbone lies now, if not where the adapters recorded it.

    Raises:
        DecodeError: The prompt is no text, has no tokens or too many, or there is no chat template.
        FamilyError, BackboneError: See `recycle.load`; or there is no tokenizer.
    """
    if prompt.encode("utf-8", "replace").decode() != prompt:
        raise DecodeError("The prompt is not text in UTF-8.")
    tokenizer = _tokenizer(source, backbone)
    if chat and tokenizer.chat_template is None:
        raise DecodeError(f"The tokenizer of {source} has no chat template; leave out --chat.")
    text = prompt
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise DecodeError("The prompt has no tokens; give some text with --prompt.")
    placement: dict[str, Any] = {}
    if torch.cuda.is_available():
        placement["device_map"] = {"": "cuda"}
    model = load(source, p, backbone=backbone, **placement)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and ids.shape[1] + max_new_tokens > window:
        raise DecodeError(
            f"The prompt and --max-new-tokens come to {ids.shape[1] + max_new_tokens} tokens, and "
            f"the backbone's window is {window}. Shorten one of them."
        )
    if not chat:
        print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = ids.to(model.device)
    with greedy_decoding(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )


def _tokenizer(source: str, backbone: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a run's folder or, where that has none, the backbone's."""
    folder = find_folder(source, None)
    if any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return load_tokenizer(str(folder))
    config = read_members(folder, Family.read(folder))[0].config
    files = find_backbone(folder, config, source, backbone)
    try:
        return load_tokenizer(files.folder)
    except BackboneError as error:
        raise BackboneError(f"neither {source} nor its backbone has a tokenizer: {error}") from None
