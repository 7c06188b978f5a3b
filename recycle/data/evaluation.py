"""Validation and test: what they take, and what leaves for sharing its lines."""

import math
from collections import Counter
from dataclasses import dataclass, field

from .text import Text, Tokenised

SURPLUS = 1.25  # documents gathered for each one wanted, since some leave
DOCUMENTS_PER_GROUP = 4  # documents of one group, at most
OVERLAP = 0.3  # share of a document's lines that training, or one other document, may hold


class Kept:
    """The evaluation documents so far, by their lines."""

    def __init__(self) -> None:
        self._documents = 0
        self._holding: dict[str, list[int]] = {}  # a line -> the documents with it

    def nearest(self, lines: set[str]) -> float:
        """The largest share of these lines that one document holds."""
        shared = Counter(number for line in lines for number in self._holding.get(line, ()))
        return max(shared.values(), default=0) / max(len(lines), 1)

    def add(self, lines: set[str]) -> None:
        for line in lines:
            self._holding.setdefault(line, []).append(self._documents)
        self._documents += 1


@dataclass
class EvaluationSplit:
    """Candidates of validation or test."""

    name: str
    wanted: int
    block_size: int
    lines: set[str]
    documents: int = 0
    groups: int = 0
    overlapping: int = 0
    copies: int = 0
    pool: list[Tokenised] = field(default_factory=list)
    by_group: Counter[str] = field(default_factory=Counter)
    kept: list[Tokenised] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.pool) >= math.ceil(self.wanted * SURPLUS)

    def add(self, text: Text, ids: list[int]) -> None:
        self.documents += 1
        crowded = self.full or self.by_group[text.group] >= DOCUMENTS_PER_GROUP
        if not crowded and len(ids) >= self.block_size:
            self.by_group[text.group] += 1
            self.pool.append((text, ids[: self.block_size]))
            self.lines |= text.lines()

    def keep(self, training_lines: set[str], others: Kept) -> None:
        """Take the wanted number of candidates that share few enough lines.

        Args:
            training_lines: Of the training documents.
            others: What the splits before this one kept; what this one keeps is added.
        """
        for text, ids in self.pool:
            lines = text.lines()
            if len(lines & training_lines) / max(len(lines), 1) > OVERLAP:
                self.overlapping += 1
            elif others.nearest(lines) > OVERLAP:
                self.copies += 1
            elif len(self.kept) < self.wanted:
                others.add(lines)
                self.kept.append((text, ids))

    def shortage(self) -> list[str]:
        """What is missing, in words."""
        if len(self.kept) == self.wanted:
            return []
        return [
            f"{self.name} asks for {self.wanted} documents of at least {self.block_size} tokens "
            f"and has {len(self.kept)}: of {self.documents} documents in {self.groups} groups, "
            f"{len(self.pool)} are long enough and among the first {DOCUMENTS_PER_GROUP} of their "
            f"group, {self.overlapping} of them share over {OVERLAP:.0%} of their lines with "
            f"training, and {self.copies} with another evaluation document"
        ]
