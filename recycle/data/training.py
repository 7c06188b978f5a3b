"""Training: packed tokens, and the texts that streams start from."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

from .evaluation import COPY, OVERLAP, Holders
from .text import Text, Tokenised

SPREAD = 8  # a small budget draws its blocks from documents of so many times as many tokens,
SPREAD_TOKENS = 2**20  # but no more than these: else 20k tokens would be three documents
START_SEARCH = 256  # documents read beyond full blocks to find start texts of more groups


@dataclass
class TrainingSplit:
    """Packed tokens and candidates for start texts."""

    tokens: int
    num_starts: int
    num_virtual_tokens: int
    eos: int
    holders: Holders
    name: str = "train"
    documents: int = 0
    groups: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # why, in words
    packed: "array[int]" = field(default_factory=lambda: array("i"))
    fingerprints: list[str] = field(default_factory=list)
    lines: set[str] = field(default_factory=set)  # that evaluation has too
    # Candidates for start texts, the better ones first: the first tokens of a group's first
    # document, those of its others, and what follows in any document.
    candidates: tuple[list[Tokenised], list[Tokenised], list[Tokenised]] = field(
        default_factory=lambda: ([], [], [])
    )
    patience: int = START_SEARCH

    @property
    def pool(self) -> int:
        """Tokens that the blocks are drawn from."""
        return max(self.tokens, min(self.tokens * SPREAD, SPREAD_TOKENS))

    @property
    def full(self) -> bool:
        found = len(self.candidates[0]) >= self.num_starts or self.patience <= 0
        return len(self.packed) >= self.pool and found

    @property
    def starts(self) -> list[Tokenised]:
        return list(chain(*self.candidates))[: self.num_starts]

    def add(self, text: Text, ids: list[int]) -> None:
        self.documents += 1
        lines = text.lines()
        # Of the longer of the two: one licence must not leave out all documents that begin with it.
        if any(n > OVERLAP * max(size, len(lines)) for n, size in self.holders.shared(lines)):
            self.left_out[COPY] += 1
            return
        if not self.full:
            self._find_starts(text, ids)
        if len(self.packed) < self.pool:
            self.packed.extend(ids)
            self.packed.append(self.eos)
            self.fingerprints.append(text.fingerprint())
            self.lines |= lines & self.holders.of_line.keys()
        else:
            self.patience -= 1

    def _find_starts(self, text: Text, ids: list[int]) -> None:
        """Take this document's passages of n tokens as candidates, each text once."""
        n = self.num_virtual_tokens
        for begin in range(0, min(len(ids) - n, n * self.num_starts) + 1, n):
            passage = ids[begin : begin + n]
            known = any(text.group == other.group for other, _ in self.candidates[0])
            rank = self.candidates[2 if begin else int(known)]
            new = all(passage != other for _, other in chain(*self.candidates))
            if new and len(rank) < self.num_starts:
                rank.append((text, passage))

    def shortage(self) -> dict[str, str]:
        """What is missing, in words."""
        found = {}
        if len(self.packed) < self.tokens:
            found["tokens"] = (
                f"training asks for {self.tokens:_} tokens and has {len(self.packed):_}, from "
                f"{self.documents} documents"
            )
        if len(self.starts) < self.num_starts:
            found["starts"] = (
                f"{self.num_starts} streams start from as many passages of "
                f"{self.num_virtual_tokens} tokens in training documents, and there are "
                f"{len(self.starts)}"
            )
        return found
