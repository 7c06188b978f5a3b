"""Documents -> token ids, and of conversations which of them are learned."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from .chat import Example, Rendering, render
from .text import IGNORED, DataError, Text, besides

BATCH = 64  # documents given to the tokenizer at once
REMEMBERED = 2000  # conversations
PATIENCE = 1000  # conversations without a learned token in a row, before it is called an error


@dataclass(frozen=True)
class Encoded:
    """A document in token ids."""

    text: Text
    ids: list[int]  # of a conversation, those of its last example
    examples: tuple[Example, ...] = ()  # of a conversation, each of block_size tokens at most
    num_cut: int = 0  # examples that were longer
    apart: bool = False  # each turn of the assistant is an example of its own

    def evaluated(self, block_size: int) -> Example:
        """What evaluation takes: the first block, or the last example of a conversation."""
        if self.examples:
            return self.examples[-1]
        return Example(self.ids[:block_size], self.ids[:block_size])


def learned(labels: list[int]) -> list[int]:
    """The tokens that are predicted; nothing predicts the first."""
    return [label for label in labels[1:] if label != IGNORED]


class Encoder:
    """Documents -> token ids.

    It remembers a few conversations as they were rendered, which takes long: where there is too
    little data, splits of them are tried again and again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rendered: dict[str, Rendering] = {}

    def encode(
        self, texts: Iterable[Text], block_size: int, skipped: Counter[str]
    ) -> Iterator[Encoded]:
        """Documents that differ, in token ids; counts in `skipped` what is left out.

        Raises:
            DataError: No conversation has a token to learn.
        """
        distinct = _distinct(texts, skipped)
        found = False
        while batch := list(islice(distinct, BATCH)):
            if batch[0].conversation is None:
                yield from self._plain(batch)
                continue
            for text in batch:
                if document := self._chat(text, block_size, skipped):
                    found = True
                    yield document
            if not found and sum(skipped.values()) > PATIENCE:
                raise _nothing_learned(block_size, skipped)
        if not found and any("learned" in reason for reason in skipped):
            raise _nothing_learned(block_size, skipped)

    def _plain(self, batch: list[Text]) -> Iterator[Encoded]:
        """As the tokenizer starts a text, without an end-of-sequence token of its own."""
        end = self.tokenizer.eos_token_id
        # verbose=False: a document may well be longer than the model's window.
        encoded = self.tokenizer([text.text for text in batch], verbose=False)
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            yield Encoded(text, ids[:-1] if ids[-1:] == [end] else ids)

    def _chat(self, text: Text, block_size: int, skipped: Counter[str]) -> Encoded | None:
        examples, apart = self._render(text)
        if not any(learned(example.labels) for example in examples):
            skipped["without a learned token"] += 1
            return None
        cut = [Example(x.input_ids[:block_size], x.labels[:block_size]) for x in examples]
        kept = tuple(example for example in cut if learned(example.labels))
        if not kept:
            skipped[f"without a learned token in the first {block_size}"] += 1
            return None
        num_cut = sum(len(example.input_ids) > block_size for example in examples)
        return Encoded(text, kept[-1].input_ids, kept, num_cut, apart)

    def _render(self, text: Text) -> Rendering:
        assert text.conversation is not None
        key = text.fingerprint()
        rendering = self.rendered.get(key) or render(text.conversation, self.tokenizer)
        if len(self.rendered) < REMEMBERED:
            self.rendered[key] = rendering
        return rendering


def _nothing_learned(block_size: int, skipped: Counter[str]) -> DataError:
    return DataError(
        f"No conversation has a token to learn{besides(skipped)}. Either the chat template writes "
        "an answer in another way than it asks for one, or answers begin only after "
        f"data.block_size={block_size} tokens. Use another backbone, a larger `data.block_size`, "
        "or `data.format=text`."
    )


def _distinct(texts: Iterable[Text], skipped: Counter[str]) -> Iterator[Text]:
    """Leave out what is empty or no text, and all but the first of documents that are alike."""
    seen: set[str] = set()
    for text in texts:
        if not text.text.strip():
            skipped["empty"] += 1
        elif text.is_binary:
            skipped["binary"] += 1
        elif text.digest in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(text.digest)
            yield text
