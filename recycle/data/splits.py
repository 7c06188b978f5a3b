"""Documents of a source -> splits that share no group -> rows of tokens.

One rule for every source. Documents come in an order shuffled by `seed`, each with a group: a
top-level package, a folder, a repository, or the document itself. A group seen for the first time
goes to test while test lacks documents, then to validation, then to train, and keeps its split.
Near copies of an evaluation document are left out of all three. Train ends when it has enough for
its blocks; then evaluation documents leave that share too many lines with all that was trained on.

Evaluation takes the first block of a document. Train concatenates documents, each ended by the
tokenizer's end-of-sequence token, and cuts the result into blocks. Conversations stay whole: see
`encoding.py` and `packing.py`.

Stages that learn from equal data share one reading: a later one goes on where the earlier one has
enough, and where the source runs dry it takes the rows that the earlier one has to spare. Of
different data the last stage's decides the test, and no stage learns from near copies of any
evaluation document. All candidates for evaluation are found before training sees a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recycle.progress import Silent

from .advice import Shortage, advice
from .encoding import Encoder
from .evaluation import Document, EvaluationSplit, Holders
from .mix import holds_chat
from .packing import Packing
from .reading import Reading
from .text import DataError
from .training import StageData, TrainingSplit


@dataclass(frozen=True)
class Splits:
    """What `prepare` returns."""

    train: tuple[datasets.Dataset, ...]
    """Of each stage: input_ids and labels, held in memory, `block_size` tokens in a row. Packed
    conversations have position_ids too; conversations that cannot be packed are rows of their own
    length."""
    validation: tuple[list[Document], ...]  # of each stage
    test: list[Document]  # of the last stage's data
    starts: Tensor  # int64 [num_starts, num_virtual_tokens], of the last stage's training text
    facts: tuple[dict[str, Any], ...]  # of each stage: what was read and kept; plain JSON


def prepare(
    stages: Sequence[StageData],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_virtual_tokens: int,
    num_starts: int,
    packs: bool = True,
    progress: Silent | None = None,
) -> Splits:
    """Read data, split it, and return rows of tokens; equal arguments give equal splits.

    Args:
        stages: what each stage of training learns from, in their order; 0 blocks are legal.
        tokenizer: the backbone's; must have an end-of-sequence token.
        num_virtual_tokens: length of a start text in tokens.
        num_starts: start texts, where possible of as many groups, else documents, else passages.
        packs: whether the backbone keeps sequences apart that are packed into one row.
        progress: shows how far it is.

    Raises:
        DataError: a source cannot be read, or holds too little; says which settings would do.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "A training document ends with the tokenizer's end-of-sequence token, and this one has "
            "none. Set `eos_token` in the backbone's tokenizer_config.json."
        )

    encoder = Encoder(tokenizer)

    def split(asked: Sequence[StageData], shown: Silent | None = None) -> Splits:
        shown = shown or Silent()  # trials show nothing
        return _split(asked, encoder, num_virtual_tokens, num_starts, packs, shown)

    try:
        return split(stages, progress)
    except Shortage as shortage:
        raise DataError(f"{shortage} {advice(split, stages, shortage)}") from None


def _split(
    stages: Sequence[StageData],
    encoder: Encoder,
    num_virtual_tokens: int,
    num_starts: int,
    packs: bool,
    progress: Silent,
) -> Splits:
    tokenizer = encoder.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    holders = Holders()  # complete before any training sees a document
    trainings = []
    chat = any(holds_chat(stage.data) for stage in stages)  # all rows have the same columns
    for number, stage in enumerate(stages, start=1):
        last, block_size = number == len(stages), stage.data.block_size
        training = TrainingSplit(
            blocks=stage.blocks,
            num_starts=num_starts if last else 0,
            num_candidates=num_starts,
            num_virtual_tokens=num_virtual_tokens,
            holders=holders,
            packing=Packing(block_size, end, end if pad is None else pad, packs, chat),
            label=f"stage {number}: " if len(stages) > 1 else "",
        )
        trainings.append(training)
    split_of: dict[tuple[str, str], EvaluationSplit | TrainingSplit] = {}
    readings: list[Reading] = []  # the last stage's first: its evaluation is the one that counts
    for stage in reversed(stages):
        if all(stage.data != reading.data for reading in readings):
            own = [t for t, s in zip(trainings, stages, strict=True) if s.data == stage.data]
            with_test = not readings
            readings.append(Reading(stage.data, encoder, own, holders, split_of, with_test))
    progress.start("reading the data", sum(training.pool for training in trainings))
    for reading in readings:
        reading.gather()
    for reading in readings:
        reading.train(progress)
    lines: set[str] = set().union(*(training.evaluation_lines() for training in trainings))
    for reading in readings:
        reading.keep(lines)

    of_stage = [next(r for r in readings if r.data == stage.data) for stage in stages]
    rows = [x.rows(stage.data.seed) for x, stage in zip(trainings, stages, strict=True)]
    validation = {id(x): x.validation.results(tokenizer) for x in readings}
    starts = [ids for _, ids in trainings[-1].starts]
    return Splits(
        train=tuple(x.packing.table(own) for x, own in zip(trainings, rows, strict=True)),
        validation=tuple(validation[id(reading)] for reading in of_stage),
        test=readings[0].test.results(tokenizer),
        starts=torch.tensor(starts, dtype=torch.int64).view(num_starts, num_virtual_tokens),
        facts=tuple(
            reading.facts(x, own) for reading, x, own in zip(of_stage, trainings, rows, strict=True)
        ),
    )
