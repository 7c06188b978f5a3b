"""Documents of a source -> splits that share no group -> blocks of tokens.

One rule for every source. Documents come in an order shuffled by `seed`, each with a group: a
top-level package, a folder, a repository, or the document itself. A group seen for the first time
goes to test while test lacks documents, then to validation, then to train, and keeps its split.
Near copies of an evaluation document are left out of all three. Train ends when it has enough for
its blocks; then evaluation documents leave that share too many lines with all that was trained on.

Evaluation takes the first block of a document. Train concatenates documents, each ended by the
tokenizer's end-of-sequence token, and cuts the result into blocks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recycle.progress import Silent
from recycle.recipe import Data

from .evaluation import COPY, DOCUMENTS_PER_GROUP, OVERLAP, TRAINED_ON, EvaluationSplit, Holders
from .files import read_files, read_stdlib
from .rows import read_hub, read_jsonl
from .text import DataError, Text, Tokenised, besides, sha256
from .training import TrainingSplit

# Each yields documents in an order shuffled by data.seed, adds to `facts` what identifies the
# source, and counts in `skipped` what it leaves out.
_SOURCES = {"hub": read_hub, "files": read_files, "jsonl": read_jsonl, "stdlib": read_stdlib}
_BATCH = 64  # documents given to the tokenizer at once


IGNORED = -100  # label of a token that nothing is learned from
FEW_BLOCKS = 64  # which an optimiser step may well want more than
SMALL = 2000  # documents; of so few it is tried out which settings would do


@dataclass(frozen=True)
class Document:
    """The first block of one document, for evaluation."""

    name: str
    group: str
    input_ids: list[int]  # exactly block_size
    labels: list[int]  # the same, or -100 where nothing is to be predicted
    num_bytes: int  # UTF-8 bytes of the text of the predicted tokens

    @property
    def predicted_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Splits:
    """What `prepare` returns."""

    train: datasets.Dataset  # input_ids and labels, rows of block_size tokens, held in memory
    validation: list[Document]
    test: list[Document]
    starts: Tensor  # int64 [num_starts, num_virtual_tokens]
    facts: dict[str, Any]  # what was read, left out and kept; plain JSON


class _Shortage(DataError):
    """The source holds too little for what was asked of it."""

    def __init__(
        self, missing: dict[str, str], train: TrainingSplit, read: int, besides: str
    ) -> None:
        super().__init__(f"There is too little data{besides}: {'; '.join(missing.values())}.")
        self.missing = missing.keys()  # "test", "validation", "tokens" or "starts"
        self.train_tokens = len(train.packed)  # that are there
        self.documents = read


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_blocks: int,
    num_virtual_tokens: int,
    num_starts: int,
    progress: Silent | None = None,
) -> Splits:
    """Read `data`, split it, and return token blocks; equal arguments give equal splits.

    Args:
        data: section `data` of a recipe.
        tokenizer: the backbone's; must have an end-of-sequence token.
        train_blocks: rows of `Splits.train`; 0 is legal.
        num_virtual_tokens: length of a start text in tokens.
        num_starts: start texts, where possible of as many groups, else documents, else passages.
        progress: shows how far it is.

    Raises:
        DataError: the source cannot be read, or holds too little; says which settings would do.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "A training document ends with the tokenizer's end-of-sequence token, and this one has "
            "none. Set `eos_token` in the backbone's tokenizer_config.json."
        )

    def split(asked: Data, blocks: int, shown: Silent | None = None) -> Splits:
        shown = shown or Silent()  # trials show nothing
        return _split(asked, tokenizer, blocks, num_virtual_tokens, num_starts, shown)

    try:
        return split(data, train_blocks, progress)
    except _Shortage as shortage:
        raise DataError(f"{shortage} {_advice(split, data, train_blocks, shortage)}") from None


def _advice(
    split: Callable[[Data, int], Splits], data: Data, train_blocks: int, shortage: _Shortage
) -> str:
    """Settings under which the source is enough; of a small one, found by trying them."""
    if shortage.missing == {"starts"}:
        return "Set method.init=random or a smaller method.num_virtual_tokens, or give more data."
    small = data.source != "hub" and shortage.documents <= SMALL
    found: _Shortage | None = shortage
    for settings in ({}, *(_smaller(data) if small else ())):
        asked = data.model_copy(update=settings)
        block, more = asked.block_size, ""
        if settings:
            try:
                split(asked, train_blocks * data.block_size // block)
                found = None
            except _Shortage as still:
                found = still
        changed = [f"data.{name}={value}" for name, value in settings.items()]
        if found is not None:
            blocks = found.train_tokens // block
            if found.missing != {"tokens"} or not blocks:
                continue
            changed.append(f"training.tokens={blocks * block}")
            more = f" (and training.batch_size at most {blocks})" if blocks < FEW_BLOCKS else ""
        return f"This would do: {' '.join(changed)}{more}. Or give more data."
    return f"{'Smaller settings would not do either: give' if small else 'Give'} more data."


def _smaller(data: Data) -> Iterator[dict[str, int]]:
    """Ever smaller settings, as far as they differ from those of `data`."""
    for halvings in range(4):
        wanted = max(data.test_documents, data.validation_documents)
        while wanted >= 2:
            settings = {
                "test_documents": min(data.test_documents, wanted),
                "validation_documents": min(data.validation_documents, max(wanted // 2, 2)),
                "block_size": max(data.block_size >> halvings, 2),
            }
            yield {name: n for name, n in settings.items() if n != getattr(data, name)}
            wanted = wanted * 3 // 4


def _split(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    train_blocks: int,
    num_virtual_tokens: int,
    num_starts: int,
    progress: Silent,
) -> Splits:
    eos = tokenizer.eos_token_id
    facts: dict[str, Any] = {"source": data.source, "seed": data.seed}
    skipped: Counter[str] = Counter()
    holders = Holders()  # complete before train sees a document
    test, validation = (
        EvaluationSplit(name, wanted, data.block_size, holders)
        for name, wanted in (
            ("test", data.test_documents),
            ("validation", data.validation_documents),
        )
    )
    train = TrainingSplit(
        train_blocks * data.block_size, num_starts, num_virtual_tokens, eos, holders
    )
    split_of: dict[str, EvaluationSplit | TrainingSplit] = {}

    texts = _distinct(_SOURCES[data.source](data, facts, skipped), skipped)
    progress.start("reading the data", train.pool)
    for text, ids in _tokenised(texts, tokenizer, eos):
        if text.group not in split_of:
            split_of[text.group] = next((s for s in (test, validation) if not s.full), train)
            split_of[text.group].groups += 1
        before = len(train.packed)
        split_of[text.group].add(text, ids)
        progress.advance(min(len(train.packed), train.pool) - min(before, train.pool))
        if train.full and test.full and validation.full:
            break

    starts = train.starts
    for text, _ in starts:
        train.lines |= text.lines() & holders.of_line.keys()
    for evaluation in (test, validation):
        evaluation.keep(train.lines)
    if missing := test.shortage() | validation.shortage() | train.shortage():
        read = sum(split.documents for split in (test, validation, train))
        raise _Shortage(missing, train, read, besides(skipped))

    whole = len(train.packed) // data.block_size
    blocks = np.array(train.packed[: whole * data.block_size]).reshape(whole, data.block_size)
    order = np.random.default_rng(data.seed).permutation(whole)[:train_blocks]
    kept = {"test": test.kept, "validation": validation.kept}
    used = {name: [text.fingerprint() for text, _ in pairs] for name, pairs in kept.items()}
    used |= {"train": train.fingerprints, "starts": [text.fingerprint() for text, _ in starts]}
    splits = (train, validation, test)
    facts |= {
        "skipped": dict(skipped),
        "documents_read": {split.name: split.documents for split in splits},
        "groups_read": {split.name: split.groups for split in splits},
        "documents_used": {name: len(prints) for name, prints in used.items()},
        "documents_per_evaluation_group": DOCUMENTS_PER_GROUP,
        "overlap_limit": OVERLAP,
        "overlap_removed": {split.name: split.left_out[TRAINED_ON] for split in splits[1:]},
        "copies_removed": {split.name: split.left_out[COPY] for split in splits},
        "block_size": data.block_size,
        "tokens": {name: len(pairs) * data.block_size for name, pairs in kept.items()}
        | {"train": train.tokens, "train_pool": len(train.packed)},
        "start_texts": [text.name for text, _ in starts],
        "sha256": {name: sha256("\n".join(sorted(prints))) for name, prints in used.items()},
    }
    return Splits(
        train=_dataset(blocks[order]),
        validation=[_document(text, ids, tokenizer) for text, ids in validation.kept],
        test=[_document(text, ids, tokenizer) for text, ids in test.kept],
        starts=torch.tensor([ids for _, ids in starts], dtype=torch.int64).view(
            num_starts, num_virtual_tokens
        ),
        facts=facts,
    )


def _document(text: Text, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Document:
    predicted = tokenizer.decode(
        ids[1:], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Document(text.name, text.group, ids, ids, len(predicted.encode()))


def _dataset(blocks: np.ndarray) -> datasets.Dataset:
    """Rows of `blocks` as a table in memory, so that nothing stays in the user's cache."""
    tokens = datasets.List(datasets.Value("int32"))
    columns = ("input_ids", "labels")
    return datasets.Dataset.from_dict(
        {name: list(blocks) for name in columns},
        features=datasets.Features(dict.fromkeys(columns, tokens)),
    )


def _distinct(texts: Iterable[Text], skipped: Counter[str]) -> Iterator[Text]:
    """Leave out what is empty or no text, and all but the first of documents that are alike."""
    seen: set[str] = set()
    for text in texts:
        content = text.normalised()
        if not content:
            skipped["empty"] += 1
        elif text.is_binary:
            skipped["binary"] += 1
        elif (digest := sha256(content)) in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(digest)
            yield text


def _tokenised(
    texts: Iterator[Text], tokenizer: PreTrainedTokenizerBase, eos: int
) -> Iterator[Tokenised]:
    """Token ids as the tokenizer starts a text, without an end-of-sequence token of its own."""
    while batch := list(islice(texts, _BATCH)):
        # verbose=False: a document may well be longer than the model's window.
        encoded = tokenizer([text.text for text in batch], verbose=False)
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            yield text, ids[:-1] if ids[-1:] == [eos] else ids
