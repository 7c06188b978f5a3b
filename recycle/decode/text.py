"""Text from a finished run, streamed to standard output."""

import sys

from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from recycle.family import FamilyError, load
from recycle.family.folder import find_folder


def generate_text(source: str, prompt: str, p: int | None, max_new_tokens: int, chat: bool) -> None:
    """Go on with a prompt, greedily, and print the text as it comes.

    Args:
        source: A run folder, an adapter folder or a Hub id.
        prompt: The text to go on with.
        p: Streams; None is the most that there are.
        max_new_tokens: At most so many tokens.
        chat: The prompt is a user's message in the tokenizer's chat template.

    Raises:
        FamilyError: See `recycle.load`; or there is no tokenizer, or it has no chat template.
    """
    model = load(source, p)
    config = model.peft_config[model.active_adapter]
    tokenizer = _tokenizer(source, config)
    if config.backbone_quantization is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        trained = f"Trained on a backbone in {config.backbone_quantization}, running on {dtype}."
        print(trained, file=sys.stderr)
    if prompt.encode("utf-8", "replace").decode() != prompt:
        raise FamilyError("The prompt is not text in UTF-8.")
    if chat and tokenizer.chat_template is None:
        raise FamilyError(f"The tokenizer of {source} has no chat template; leave out --chat.")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if not inputs["input_ids"].numel():
        raise FamilyError("The prompt has no tokens; give some text with --prompt.")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1] + max_new_tokens
    if window and length > window:
        raise FamilyError(
            f"The prompt and --max-new-tokens come to {length} tokens, and the backbone's window "
            f"is {window}. Shorten one of them."
        )
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def _tokenizer(source: str, config: PeftConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a run's folder or, where that has none, the backbone's."""
    folder = find_folder(source, None)
    own = any(folder.glob("tokenizer*"))
    where = str(folder) if own else str(config.base_model_name_or_path)
    revision = None if own else config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FamilyError(f"The tokenizer in {where} cannot be read: {reason}") from None
    # Where no tokenizer file is, some model types get an empty tokenizer rather than an error.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FamilyError(f"Neither {source} nor its backbone {where} has a tokenizer.")
    return tokenizer
