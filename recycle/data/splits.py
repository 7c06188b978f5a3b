"""Documents of a source -> splits that share no group -> blocks of tokens.

One rule for every source. Documents come in an order shuffled by `seed`, each with a group: a
top-level package, a folder, a repository, or the document itself. A group seen for the first time
goes to test while test lacks documents, then to validation, then to train, and keeps its split.
Train ends when it has enough for its blocks. Then an evaluation document that shares too many lines
with the training documents leaves.

Evaluation takes the first block of a document. Train concatenates documents, each ended by the
tokenizer's end-of-sequence token, and cuts the result into blocks.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recycle.recipe import Data

from .evaluation import DOCUMENTS_PER_GROUP, OVERLAP, Evaluation
from .files import read_files, read_stdlib
from .rows import read_hub, read_jsonl
from .text import DataError, Text, Tokenised, sha256
from .training import Training

# Each yields documents in an order shuffled by data.seed, adds to `facts` what identifies the
# source, and counts in `skipped` what it leaves out.
_SOURCES = {"hub": read_hub, "files": read_files, "jsonl": read_jsonl, "stdlib": read_stdlib}
_BATCH = 64  # documents given to the tokenizer at once


@dataclass(frozen=True)
class Document:
    """The first block of one document, for evaluation."""

    name: str
    group: str
    input_ids: list[int]  # exactly block_size
    num_bytes: int  # UTF-8 bytes of the text of input_ids[1:], the tokens that a model predicts


@dataclass(frozen=True)
class Splits:
    """What `prepare` returns."""

    train: datasets.Dataset  # column input_ids, rows of exactly block_size tokens, held in memory
    validation: list[Document]
    test: list[Document]
    starts: Tensor  # int64 [num_starts, num_virtual_tokens]
    facts: dict[str, Any]  # what was read, left out and kept; plain JSON


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_blocks: int,
    num_virtual_tokens: int,
    num_starts: int,
) -> Splits:
    """Read `data`, split it, and return token blocks; equal arguments give equal splits.

    Args:
        data: section `data` of a recipe.
        tokenizer: the backbone's; must have an end-of-sequence token.
        train_blocks: rows of `Splits.train`; 0 is legal.
        num_virtual_tokens: length of a start text in tokens.
        num_starts: start texts, each from another training document, and group where possible.

    Raises:
        DataError: the source cannot be read, or holds too little.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "A training document ends with the tokenizer's end-of-sequence token, and this one has "
            "none. Set `eos_token` in the backbone's tokenizer_config.json."
        )
    facts: dict[str, Any] = {"source": data.source, "seed": data.seed}
    skipped: Counter[str] = Counter()
    lines: set[str] = set()  # of all evaluation candidates, complete before train sees a document
    test = Evaluation("test", data.test_documents, data.block_size, lines)
    validation = Evaluation("validation", data.validation_documents, data.block_size, lines)
    train = Training(train_blocks * data.block_size, num_starts, num_virtual_tokens, eos, lines)
    split_of: dict[str, Evaluation | Training] = {}

    texts = _distinct(_SOURCES[data.source](data, facts, skipped), skipped)
    with tqdm(total=train.pool, desc="data", unit="token", disable=None, leave=False) as progress:
        for text, ids in _tokenised(texts, tokenizer, eos):
            if text.group not in split_of:
                split_of[text.group] = next((s for s in (test, validation) if not s.full), train)
                split_of[text.group].groups += 1
            split_of[text.group].add(text, ids)
            progress.update(min(len(train.packed), train.pool) - progress.n)
            if train.full and test.full and validation.full:
                break

    starts = train.starts
    for text, _ in starts:
        train.shared_lines |= text.lines() & lines
    kept = {
        "test": test.keep(train.shared_lines, skipped),
        "validation": validation.keep(train.shared_lines, skipped, first=test),
    }
    train.check(skipped, held_back=test.documents + validation.documents)

    whole = len(train.packed) // data.block_size
    blocks = np.array(train.packed[: whole * data.block_size]).reshape(whole, data.block_size)
    order = np.random.default_rng(data.seed).permutation(whole)[:train_blocks]
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
        "overlap_removed": {split.name: split.removed for split in (validation, test)},
        "block_size": data.block_size,
        "tokens": {name: len(pairs) * data.block_size for name, pairs in kept.items()}
        | {"train": train.tokens, "train_pool": len(train.packed)},
        "start_texts": [text.name for text, _ in starts],
        "sha256": {name: sha256("\n".join(sorted(prints))) for name, prints in used.items()},
    }
    return Splits(
        train=_dataset(blocks[order]),
        validation=[_document(text, ids, tokenizer) for text, ids in kept["validation"]],
        test=[_document(text, ids, tokenizer) for text, ids in kept["test"]],
        starts=torch.tensor([ids for _, ids in starts], dtype=torch.int64).view(
            num_starts, num_virtual_tokens
        ),
        facts=facts,
    )


def _document(text: Text, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Document:
    predicted = tokenizer.decode(
        ids[1:], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Document(text.name, text.group, ids, len(predicted.encode()))


def _dataset(blocks: np.ndarray) -> datasets.Dataset:
    """Rows of `blocks` as a table in memory, so that nothing stays in the user's cache."""
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": list(blocks)}, features=features)


def _distinct(texts: Iterable[Text], skipped: Counter[str]) -> Iterator[Text]:
    """Leave out empty documents and all but the first of equal ones."""
    seen: set[str] = set()
    for text in texts:
        if not text.text.strip():
            skipped["empty"] += 1
        elif (digest := sha256(text.text)) in seen:
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
