"""Validation and test: what they take, and what is left out for sharing its lines."""

from collections import Counter
from dataclasses import dataclass, field

from .text import Text, Tokenised

SURPLUS = 1.25  # documents gathered for each one wanted, since some leave
DOCUMENTS_PER_GROUP = 4  # documents of one group, at most
OVERLAP = 0.3  # share of a document's lines that others may hold
# Why documents are left out, in words.
COPY = "near copies of others"
TRAINED_ON = f"with over {OVERLAP:.0%} of their lines in training"


class Holders:
    """The documents of validation and test so far, by their lines."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # distinct lines of each document
        self.of_line: dict[str, list[int]] = {}

    def shared(self, lines: set[str]) -> list[tuple[int, int]]:
        """Of each document with some of these lines, how many it shares and how many it has."""
        shared = Counter(number for line in lines for number in self.of_line.get(line, ()))
        return [(count, self.sizes[number]) for number, count in shared.items()]

    def add(self, lines: set[str]) -> None:
        for line in lines:
            self.of_line.setdefault(line, []).append(len(self.sizes))
        self.sizes.append(len(lines))


@dataclass
class EvaluationSplit:
    """Candidates of validation or test."""

    name: str
    wanted: int
    block_size: int
    holders: Holders
    documents: int = 0
    groups: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # why, in words
    pool: list[Tokenised] = field(default_factory=list)
    by_group: Counter[str] = field(default_factory=Counter)
    kept: list[Tokenised] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.pool) >= round(self.wanted * SURPLUS)

    def add(self, text: Text, ids: list[int]) -> None:
        self.documents += 1
        if self.full:
            return
        lines = text.lines()
        if len(ids) < self.block_size:
            self.left_out["shorter"] += 1
        elif self.by_group[text.group] >= DOCUMENTS_PER_GROUP:
            self.left_out[f"beyond the first {DOCUMENTS_PER_GROUP} of their group"] += 1
        elif any(n > OVERLAP * len(lines) for n, _ in self.holders.shared(lines)):
            self.left_out[COPY] += 1
        else:
            self.holders.add(lines)
            self.by_group[text.group] += 1
            self.pool.append((text, ids[: self.block_size]))

    def keep(self, training_lines: set[str]) -> None:
        """Take the wanted number of candidates that share few enough lines with training."""
        for text, ids in self.pool:
            lines = text.lines()
            if len(lines & training_lines) > OVERLAP * len(lines):
                self.left_out[TRAINED_ON] += 1
            elif len(self.kept) < self.wanted:
                self.kept.append((text, ids))

    def shortage(self) -> dict[str, str]:
        """What is missing, in words."""
        if len(self.kept) == self.wanted:
            return {}
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        told = (
            f"{self.name} asks for {self.wanted} documents of at least {self.block_size} tokens "
            f"and has {len(self.kept)}, from {self.documents} documents in {self.groups} groups"
        )
        return {self.name: told + (f" ({left_out})" if left_out else "")}
