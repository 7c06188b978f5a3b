"""The sources of a data section: one, or several that are mixed by weight."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from recycle.recipe import Data
from recycle.recipe.schema import Part

from .chat import Conversation
from .encoding import Encoded, Encoder
from .files import read_files, read_stdlib
from .rows import read_hub, read_rows
from .tasks import Task, make_tasks
from .text import DataError, Text, besides


def read_tasks(data: Data, facts: dict[str, Any], skipped: Counter[str]) -> Iterator[Text]:
    """Small tasks with checkable answers; no two are alike, so each is a group of its own."""
    facts["conversations"] = data.conversations
    for task in make_tasks(data.conversations, data.seed):
        conversation = as_conversation(task)
        yield Text(task.name, task.name, conversation.text(), conversation, task.answer)


def as_conversation(task: Task) -> Conversation:
    """A task as its user's turn and the assistant's."""
    asked = {"role": "user", "content": task.prompt}
    answered = {"role": "assistant", "content": task.answer}
    return Conversation([asked, answered], None, (1,))


# Each yields documents in an order shuffled by data.seed, adds to `facts` what identifies the
# source, and counts in `skipped` what it leaves out.
_SOURCES = {
    "hub": read_hub,
    "files": read_files,
    "jsonl": read_rows,
    "parquet": read_rows,
    "stdlib": read_stdlib,
    "tasks": read_tasks,
}
_IN_ORDER = {"files": read_files, "jsonl": read_rows, "parquet": read_rows}


class Supply:
    """A source that is being read; `documents` yields it in token ids."""

    def __init__(self, name: str, weight: float, data: Data, encoder: Encoder) -> None:
        self.name = name  # in a mix, else empty
        self.weight = weight
        self.facts: dict[str, Any] = {"source": data.source}
        self.skipped: Counter[str] = Counter()
        self.dry = False  # read to its end
        texts = _SOURCES[data.source](data, self.facts, self.skipped)
        if name:
            texts = _named(texts, name)
        self.documents = encoder.encode(texts, data.block_size, self.skipped)
        if name:
            key = rf"\bdata\.(?=({'|'.join(Part.model_fields)})\b)"
            self.documents = _renamed(self.documents, key, f"data.mix.{name}.")

    def ran_dry(self) -> str:
        return (
            f"the part {self.name} of data.mix ran dry{besides(self.skipped)}; give it more, or a "
            f"smaller data.mix.{self.name}.weight"
        )


def parts_of(data: Data, encoder: Encoder) -> list[Supply]:
    """What is mixed; a source that is no mix is the only part."""
    if data.source != "mix":
        return [Supply("", 1.0, data, encoder)]
    if not data.mix:
        raise DataError(
            "data.source=mix needs parts, and data.mix has none. Set `data.mix.NAME.source` and "
            "what that source needs, for each part."
        )
    shared = {"block_size", "validation_documents", "test_documents", "seed"}
    found = []
    for name, part in sorted(data.mix.items()):
        if part.source == "mix":
            raise DataError(
                f"The parts of a mix are sources themselves, and data.mix.{name}.source is mix. "
                f"Valid: {', '.join(_SOURCES)}."
            )
        fields = part.model_dump(exclude={"weight"}) | data.model_dump(include=shared)
        found.append(Supply(name, part.weight, Data.model_validate(fields), encoder))
    return found


def holds_chat(data: Data) -> bool:
    """Whether there are conversations in it."""
    return any(x.source == "tasks" or x.format == "chat" for x in (data, *data.mix.values()))


def own_test(
    data: Data, encoder: Encoder, facts: dict[str, Any], skipped: Counter[str]
) -> Iterator[Encoded]:
    """The documents of data.test_path, in their order."""
    asked = data.model_copy(update={"path": data.test_path})
    texts = _IN_ORDER[data.source](asked, facts, skipped, in_order=True)
    documents = encoder.encode(texts, data.block_size, skipped)
    return _renamed(documents, r"\bdata\.path\b", "data.test_path")


def _named(texts: Iterator[Text], name: str) -> Iterator[Text]:
    for text in texts:
        yield replace(text, group=f"{name}/{text.group}", name=f"{name}/{text.name}")


def _renamed(documents: Iterator[Encoded], key: str, name: str) -> Iterator[Encoded]:
    """The same documents; errors call a field by its name in the recipe."""
    try:
        yield from documents
    except DataError as error:
        raise DataError(re.sub(key, name, str(error))) from None
