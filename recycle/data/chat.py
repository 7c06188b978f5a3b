"""A conversation as a row gives it, and as token ids with labels on what the assistant says.

The backbone's chat template decides which tokens are learned, in one of three ways:

1. It marks them, with `{% generation %}`.
2. It writes the beginning of a conversation as it writes the same messages in the whole: a turn is
   what follows its prompt, and is learned up to the token that ends it.
3. It does not (Qwen3 leaves out the thoughts of earlier turns): each of the assistant's turns is an
   example of its own, after the prompt that inference would see.

Ids are always those of the template's text: a beginning-of-sequence token is its to write. A plain
prompt with its completion has no template, and is tokenised as text is.
"""

import json
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .text import IGNORED, DataError

_MARKS = re.compile(r"\{%[-+]?\s*generation\b")
_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "observation": "tool"}
_ROLES |= dict.fromkeys(("gpt", "model", "bot", "function_call"), "assistant")


@dataclass(frozen=True)
class Conversation:
    """What was said, and which of it is learned: the last of the assistant's turns, or all."""

    messages: list[dict[str, Any]]  # role, content (text or None), perhaps tool_calls, name, ...
    tools: list[Any] | None  # goes to the template
    learned: tuple[int, ...]  # places in `messages` of the assistant's turns that are learned
    where: str = "a conversation"  # file and line, for messages of errors
    plain: bool = False  # a prompt and its completion, which no template touches

    def text(self) -> str:
        """The contents of all messages but the system's, each on lines of its own."""
        said = [m["content"] for m in self.messages if m["role"] not in ("system", "developer")]
        return "\n".join(filter(None, said))


class Example(NamedTuple):
    """Token ids and labels of one length; -100 labels what nothing is learned from."""

    input_ids: list[int]
    labels: list[int]


class Rendering(NamedTuple):
    """What a conversation is trained as."""

    examples: list[Example]  # none where no token is learned
    apart: bool  # each of the assistant's turns became an example of its own


def read_conversation(row: dict[str, Any], messages_field: str, where: str) -> Conversation:
    """The conversation of a row, in any of the formats of TRL, or of ShareGPT.

    Args:
        row: named fields.
        messages_field: the field that holds the messages, where the row has it.
        where: file and line of the row.

    Raises:
        DataError: the row is of another kind, or the assistant answers nothing in it.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    fields = (name for name in (messages_field, "conversations") if row.get(name) is not None)
    field = next(fields, None)
    if field is None and isinstance(prompt, str) and isinstance(completion, str):
        pair = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return Conversation(pair, None, (1,), where, plain=True)
    if field is not None:
        prompt, completion = [], row[field]
    elif prompt is None or completion is None:
        raise _refused(where, f"the row has the fields {', '.join(map(str, row)) or 'none'}")
    for part in (prompt, completion):
        if not isinstance(part, list):
            raise _refused(where, f"{part!r:.60} stands where a list of messages is expected")
    messages = [_message(message, where) for message in (*prompt, *completion)]
    answers = range(max(1, len(prompt)), len(messages))  # the first message answers nothing
    learned = tuple(place for place in answers if messages[place]["role"] == "assistant")
    if not learned:
        raise _refused(where, "the assistant answers nothing")
    return Conversation(messages, _tools(row.get("tools"), where), learned, where)


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with the role by the name that templates know, and its content as one text."""
    if not isinstance(message, dict):
        raise _refused(where, f"{message!r:.60} stands where a message is expected")
    speaker, said = ("role", "content") if "role" in message else ("from", "value")
    name, content = message.get(speaker), message.get(said)
    role = _ROLES.get(str(name))
    if role is None:
        raise _refused(where, f"a message has `{speaker}` {name!r:.60}")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and role == "assistant"):
        raise _refused(where, f"`{said}` of a message of {name} is {content!r:.60}")
    # A table writes None for what a message does not have.
    kept = {
        key: value
        for key, value in message.items()
        if key not in (speaker, said) and value is not None
    }
    kept |= {"role": role, "content": content}
    if name == "function_call":
        kept |= {"content": None, "tool_calls": _calls(content, where)}
    return kept


def _calls(content: str | None, where: str) -> list[dict[str, Any]]:
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise _refused(
            where, f"a function_call is JSON with name and arguments, not {content!r:.60}"
        )
    return [{"type": "function", "function": call} for call in calls]


def _tools(tools: Any, where: str) -> list[Any] | None:
    found = _parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if not found:
        return None  # some templates write a heading even for an empty list
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _refused(where, f"`tools` is a list of JSON schemas, not {tools!r:.60}")
    return found


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        return text


def _refused(where: str, found: str) -> DataError:
    return DataError(
        f"{where}: {found}. A conversation is a list of messages with role and content, or with "
        "from and value, in the field that data.messages_field names or in `conversations`; or "
        "`prompt` and `completion`, both such lists or both text. Contents are text, the roles "
        f"are {', '.join(_ROLES)}, and the assistant answers once at least. Repair or leave out "
        "the row, name its field in data.messages_field, or set data.format=text."
    )


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """The examples that a conversation is trained as.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses the conversation.
    """
    apart = False
    if conversation.plain:
        examples = [_plain(conversation, tokenizer)]
    # Only a fast tokenizer knows which token a mark of the template falls on.
    elif tokenizer.is_fast and _MARKS.search(_template(conversation, tokenizer)):
        examples = [_marked(conversation, tokenizer)]
    else:
        examples, apart = _turns(conversation, tokenizer)
    return Rendering([e for e in examples if set(e.labels) != {IGNORED}], apart)


def prompt_ids(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what inference is given to make the last learned turn.

    Raises:
        DataError: as for `render`.
    """
    last = conversation.learned[-1]
    if conversation.plain:
        return _start(conversation.messages[0]["content"], tokenizer)
    return _ids(_text(conversation, tokenizer, last, prompt=True), tokenizer)


def _marked(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Example:
    """One example with the labels where the template marks what the assistant says."""
    mask = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
    whole = _applied(conversation, tokenizer, len(conversation.messages), **mask)
    marked = [place for place, mark in enumerate(whole["assistant_masks"]) if mark]
    first, before = conversation.learned[0], 0
    if any(message["role"] == "assistant" for message in conversation.messages[:first]):
        before = sum(_applied(conversation, tokenizer, first, **mask)["assistant_masks"])
    return _example(whole["input_ids"], marked[before:])


def _turns(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], bool]:
    """One example where the whole begins with every turn as it is rendered; else one per turn."""
    turns: list[tuple[list[int], range]] = []
    begins = True  # the whole begins with each turn, and each turn with its prompt
    whole = _ids(_text(conversation, tokenizer, len(conversation.messages)), tokenizer)
    ends = tokenizer.added_tokens_decoder.keys()
    for place in conversation.learned:
        prompt = _text(conversation, tokenizer, place, prompt=True)
        text = _text(conversation, tokenizer, place + 1)
        given, ids = _ids(prompt, tokenizer), _ids(text, tokenizer)
        if ids[: len(given)] != given:
            begins = False
            if not text.startswith(prompt):
                continue  # inference never gets where this turn starts
            ids = given + _ids(text.removeprefix(prompt), tokenizer)
        begins &= whole[: len(ids)] == ids
        turns.append((ids, range(len(given), _end(ids, len(given), tokenizer, ends))))
    if begins:
        return [_example(whole, [place for _, turn in turns for place in turn])], False
    return [_example(ids, turn) for ids, turn in turns], True


def _plain(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt, completion = (message["content"] for message in conversation.messages)
    given, ids = _start(prompt, tokenizer), _start(prompt + completion, tokenizer)
    if ids[: len(given)] != given:
        ids = given + _ids(completion, tokenizer)
    ids = [*ids, tokenizer.eos_token_id]
    return _example(ids, range(len(given), len(ids)))


def _start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids as the tokenizer starts a text, without an end-of-sequence token of its own."""
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _example(ids: list[int], learned: Iterable[int]) -> Example:
    labels = [IGNORED] * len(ids)
    for place in learned:
        labels[place] = ids[place]
    return Example(ids, labels)


def _end(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase, ends: Set[int]) -> int:
    """Where a turn from `start` ends: after its last token, or all of it where no token ends it."""
    end = len(ids)
    while end > start and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1  # what the template writes between turns
    return end if end > start and ids[end - 1] in ends else len(ids)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a conversation may well be longer than the model's window.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _text(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: int,
    prompt: bool = False,
) -> str:
    """What the template makes of the first messages, with the start of an answer for a prompt."""
    asked = {"tokenize": False, "add_generation_prompt": prompt}
    return _applied(conversation, tokenizer, messages, **asked)


def _applied(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, messages: int, **asked: Any
) -> Any:
    _template(conversation, tokenizer)
    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:messages], tools=conversation.tools, **asked
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{conversation.where}: the backbone's chat template refuses this conversation: "
            f"{str(error).rstrip('. ')}. Change the row to what the template takes (some take no "
            "system role, or only roles that alternate), or leave it out."
        ) from None


def _template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{conversation.where} is a conversation, and the backbone's tokenizer has no chat "
            "template to write it with. Use an instruct model as the backbone, set "
            "`chat_template` in its tokenizer_config.json, or set data.format=text."
        )
    return tokenizer.get_chat_template(tools=conversation.tools)
