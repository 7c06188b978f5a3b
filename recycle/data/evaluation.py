"""Validation and test: what they take, and what leaves for sharing its lines with training."""

import math
from collections import Counter
from dataclasses import dataclass, field

from .text import DataError, Text, Tokenised, besides

SURPLUS = 1.25  # documents gathered for each one wanted, since some leave
DOCUMENTS_PER_GROUP = 4  # documents of one group, at most
OVERLAP = 0.3  # share of a document's lines that training may hold


@dataclass
class Evaluation:
    """Candidates of validation or test."""

    name: str
    wanted: int
    block_size: int
    lines: set[str]
    documents: int = 0
    groups: int = 0
    removed: int = 0
    pool: list[Tokenised] = field(default_factory=list)
    by_group: Counter[str] = field(default_factory=Counter)

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

    def keep(
        self, training_lines: set[str], skipped: Counter[str], first: "Evaluation | None" = None
    ) -> list[Tokenised]:
        """The wanted number of candidates that share few enough lines with training.

        Args:
            training_lines: of the training documents.
            skipped: what was left out before.
            first: the split that took its groups before this one.
        """
        clean = [(text, ids) for text, ids in self.pool if _share(text, training_lines) <= OVERLAP]
        self.removed = len(self.pool) - len(clean)
        after, lower = "", f"`data.{self.name}_documents`"
        if first is not None:
            after = f" after {first.name} had taken {first.groups}"
            lower = f"`data.{first.name}_documents`, {lower}"
        if len(clean) < self.wanted:
            raise DataError(
                f"data.{self.name}_documents={self.wanted} asks for as many documents of at least "
                f"data.block_size={self.block_size} tokens, and {len(clean)} are left: "
                f"{self.documents} documents in {self.groups} groups were read for it{after}, "
                f"{len(self.pool)} are long enough and among the first {DOCUMENTS_PER_GROUP} of "
                f"their group, {self.removed} of them share over {OVERLAP:.0%} of their lines with "
                f"training{besides(skipped)}. Give data of more documents and groups, or set "
                f"{lower} or `data.block_size` lower."
            )
        return clean[: self.wanted]


def _share(text: Text, training_lines: set[str]) -> float:
    lines = text.lines()
    return len(lines & training_lines) / max(len(lines), 1)
