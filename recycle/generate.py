"""Text from a finished run, streamed to standard output."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from .parscale import load
from .parscale.family import FamilyError


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
    backbone = config.base_model_name_or_path
    tokenizer = _tokenizer(source, None) or _tokenizer(backbone, config.revision)
    if tokenizer is None:
        raise FamilyError(f"Neither {source} nor its backbone {backbone} has a tokenizer.")
    if chat and tokenizer.chat_template is None:
        raise FamilyError(f"The tokenizer of {source} has no chat template; leave out --chat.")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if not inputs["input_ids"].numel():
        raise FamilyError("The prompt has no tokens; give some text with --prompt.")
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or Hub id; None where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, ImportError):
        return None
    # Where no tokenizer file is, some model types get an empty tokenizer rather than an error.
    return None if len(tokenizer) <= len(tokenizer.all_special_tokens) else tokenizer
