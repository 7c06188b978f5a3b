"""Documents of any source that a finished run is measured on later, if it did not learn them.

One block of each document is taken, and none of a document of which over 30 % was trained on,
counted in windows of 12 tokens: rows of training are cut anywhere, so lines would be lost. Where
there are fewer documents than are wanted, their second blocks follow, then their third: so one file
of your own can be measured too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

from transformers import PreTrainedTokenizerBase

from recycle.recipe import Data

from .encoding import Encoded, Encoder, learned
from .evaluation import OVERLAP, Document
from .mix import parts_of
from .splits import Splits
from .text import DataError

WINDOW = 12  # tokens: about a line


@dataclass(frozen=True)
class HeldOut:
    """What `read_held_out` returns."""

    blocks: list[Document]
    documents: int
    left_out: int  # for sharing text with training


def read_held_out(data: Data, tokenizer: PreTrainedTokenizerBase, trained: set[int]) -> HeldOut:
    """Read blocks to measure a loss on.

    Args:
        data: The source; `test_documents` is the number of blocks, of `block_size` tokens or fewer.
        tokenizer: The backbone's.
        trained: What was trained on; see `windows_of_training`.

    Raises:
        DataError: The source cannot be read, or nothing is left of it.
    """
    kept: list[Encoded] = []
    left_out = 0
    for document in _documents(data, Encoder(tokenizer)):
        windows = _windows(document.ids)
        if len(windows & trained) > OVERLAP * len(windows):
            left_out += 1
        else:
            kept.append(document)
        if len(kept) == data.test_documents:
            break
    blocks = [list(_blocks(document, data.block_size)) for document in kept]
    in_turn = [x for x in chain.from_iterable(zip_longest(*blocks)) if x is not None]
    if not in_turn:
        raise DataError(
            f"Nothing of {data.path or data.source} can be measured: {len(kept) + left_out} "
            f"documents were read, and {left_out} of them are over {OVERLAP:.0%} text that the run "
            "learned from. Name other text."
        )
    return HeldOut(in_turn[: data.test_documents], len(kept), left_out)


def windows_of_training(splits: Splits) -> set[int]:
    """Hashes of all windows of tokens in rows that were trained on, and in the start texts."""
    rows = chain(*(x["input_ids"] for x in splits.train), splits.starts.tolist())
    return {window for row in rows for window in _windows(row)}


def _windows(ids: list[int]) -> set[int]:
    return {hash(tuple(ids[i : i + WINDOW])) for i in range(len(ids) - WINDOW + 1)}


def _documents(data: Data, encoder: Encoder) -> Iterator[Encoded]:
    """Those of a mix come from its parts in turn."""
    parts = [part.documents for part in parts_of(data, encoder)]
    yield from (x for x in chain.from_iterable(zip_longest(*parts)) if x is not None)


def _blocks(document: Encoded, block_size: int) -> Iterator[Document]:
    """All blocks of a text with something to predict; of a conversation its last example."""
    text = document.text
    if document.examples:
        pieces = [document.evaluated(block_size)[:2]]
    else:
        starts = range(0, len(document.ids), block_size)
        pieces = [(document.ids[i : i + block_size],) * 2 for i in starts]
    for number, (ids, labels) in enumerate(pieces):
        if learned(labels):
            yield Document(f"{text.name}#{number}", text.group, ids, labels, len(text.text))
