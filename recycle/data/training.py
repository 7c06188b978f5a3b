"""Training: rows of tokens, and the texts that streams start from."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from recycle.recipe import Data

from .encoding import Encoded
from .evaluation import COPY, OVERLAP, Holders
from .packing import Packing, Row
from .text import Text

SPREAD = 8  # a small budget draws its blocks from documents of so many times as many tokens,
SPREAD_TOKENS = 2**20  # but no more than these: else 20k tokens would be three documents
START_SEARCH = 256  # documents read beyond full blocks to find start texts of more groups

Start = tuple[Text, list[int]]


@dataclass(frozen=True)
class StageData:
    """What one stage of training learns from."""

    data: Data
    blocks: int  # rows

    def smaller(self, settings: dict[str, int]) -> "StageData":
        """As many tokens under other settings."""
        data = self.data.model_copy(update=settings)
        return StageData(data, self.blocks * self.data.block_size // data.block_size)


@dataclass
class TrainingSplit:
    """Packed tokens and candidates for start texts."""

    blocks: int
    num_starts: int  # 0 but in the last stage
    num_candidates: int  # of start texts, for a later stage as well
    num_virtual_tokens: int
    holders: Holders
    packing: Packing
    label: str = ""  # names the stage in errors, where there are several
    earlier: "TrainingSplit | None" = None  # of the same reading
    name: str = "train"
    documents: int = 0
    groups: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)  # why, in words
    by_part: Counter[str] = field(default_factory=Counter)  # tokens, of each part of a mix
    chat: Counter[str] = field(default_factory=Counter)  # what became of conversations
    fingerprints: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)  # that evaluation has too
    # Candidates for start texts, the better ones first: the first tokens of a group's first
    # document, those of its others, and what follows in any document.
    candidates: tuple[list[Start], list[Start], list[Start]] = field(
        default_factory=lambda: ([], [], [])
    )
    patience: int = START_SEARCH

    @property
    def tokens(self) -> int:
        return self.blocks * self.packing.block_size

    @property
    def pool(self) -> int:
        """Tokens that the blocks are drawn from."""
        return max(self.tokens, min(self.tokens * SPREAD, SPREAD_TOKENS))

    @property
    def full(self) -> bool:
        found = len(self.candidates[0]) >= self.num_starts or self.patience <= 0
        return self.packing.size >= self.pool and found

    @property
    def starts(self) -> list[Start]:
        found = list(chain(*self.candidates))
        if self.earlier and len(found) < self.num_starts:  # where the source ran dry
            known = [ids for _, ids in found]
            found += [start for start in chain(*self.earlier.candidates) if start[1] not in known]
        return found[: self.num_starts]

    @property
    def num_spare(self) -> int:
        """Rows that are not learned from."""
        return max(self.packing.num_rows - self.blocks, 0)

    @property
    def num_borrowed(self) -> int:
        """Rows of an earlier stage, which it has to spare where the source ran dry after it."""
        missing = max(self.blocks - self.packing.num_rows, 0)
        return min(missing, self.earlier.num_spare) if self.earlier else 0

    @property
    def used(self) -> list[str]:
        """Fingerprints of the documents that rows are drawn from."""
        borrowed = self.earlier.fingerprints if self.earlier and self.num_borrowed else []
        return self.fingerprints + borrowed

    def rows(self, seed: int) -> list[Row]:
        """The rows that are learned from, in their order."""
        drawn = self.packing.take(self._order(seed)[: self.blocks])
        if self.earlier and self.num_borrowed:
            spare = self.earlier._order(seed)[self.earlier.blocks :]
            drawn += self.earlier.packing.take(spare[: self.num_borrowed])
        return drawn

    def _order(self, seed: int) -> list[int]:
        order: list[int] = np.random.default_rng(seed).permutation(self.packing.num_rows).tolist()
        return order

    def evaluation_lines(self) -> set[str]:
        """The lines of evaluation that are trained on, or that streams start from."""
        of_starts = (text.lines() for text, _ in self.starts)
        return self.lines.union(*of_starts) & self.holders.of_line.keys()

    def add(self, document: Encoded) -> int:
        """Take a document or leave it out; how many of its tokens were taken."""
        self.documents += 1
        text = document.text
        lines = text.lines()
        # Of the longer of the two: one licence must not leave out all documents that begin with it.
        if self.holders.holds(text) or any(
            n > OVERLAP * max(size, len(lines)) for n, size in self.holders.shared(lines)
        ):
            self.left_out[COPY] += 1
            return 0
        if not self.full:
            self._find_starts(text, document.ids)
        if self.packing.size >= self.pool:
            self.patience -= 1
            return 0
        self.chat["examples_cut"] += document.num_cut
        self.chat["conversations_apart"] += document.apart
        self.fingerprints.append(text.fingerprint())
        self.lines |= lines & self.holders.of_line.keys()
        return self.packing.add(document)

    def _find_starts(self, text: Text, ids: list[int]) -> None:
        """Take this document's passages of n tokens as candidates, each text once."""
        n = self.num_virtual_tokens
        for begin in range(0, min(len(ids) - n, n * self.num_candidates) + 1, n):
            passage = ids[begin : begin + n]
            known = any(text.group == other.group for other, _ in self.candidates[0])
            rank = self.candidates[2 if begin else int(known)]
            new = all(passage != other for _, other in chain(*self.candidates))
            if new and len(rank) < self.num_candidates:
                rank.append((text, passage))

    def shortage(self) -> dict[str, str]:
        """What is missing, in words."""
        found = {}
        spare = self.packing.block_size * self.num_borrowed
        if self.packing.size + spare < self.tokens:
            found["tokens"] = (
                f"{self.label}training asks for {self.tokens:_} tokens and has "
                f"{self.packing.size + spare:_}, from {self.documents} documents"
            )
        if len(self.starts) < self.num_starts:
            found["starts"] = (
                f"{self.label}{self.num_starts} streams start from as many passages of "
                f"{self.num_virtual_tokens} tokens in training documents, and there are "
                f"{len(self.starts)}"
            )
        return found
