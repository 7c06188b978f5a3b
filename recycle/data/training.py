"""Training: packed tokens, and the texts that streams start from."""

from array import array
from dataclasses import dataclass, field

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
    evaluation_lines: set[str]
    name: str = "train"
    documents: int = 0
    groups: int = 0
    packed: "array[int]" = field(default_factory=lambda: array("i"))
    fingerprints: list[str] = field(default_factory=list)
    shared_lines: set[str] = field(default_factory=set)
    firsts: dict[str, Tokenised] = field(default_factory=dict)  # of each group
    others: list[Tokenised] = field(default_factory=list)  # of a group that has a first
    patience: int = START_SEARCH

    @property
    def pool(self) -> int:
        """Tokens that the blocks are drawn from."""
        return max(self.tokens, min(self.tokens * SPREAD, SPREAD_TOKENS))

    @property
    def full(self) -> bool:
        found = len(self.firsts) >= self.num_starts or self.patience <= 0
        return len(self.packed) >= self.pool and found

    @property
    def starts(self) -> list[Tokenised]:
        return [*self.firsts.values(), *self.others][: self.num_starts]

    def add(self, text: Text, ids: list[int]) -> None:
        self.documents += 1
        if len(ids) >= self.num_virtual_tokens and not self.full:
            candidate = (text, ids[: self.num_virtual_tokens])
            if text.group not in self.firsts and len(self.firsts) < self.num_starts:
                self.firsts[text.group] = candidate
            elif len(self.others) < self.num_starts:
                self.others.append(candidate)
        if len(self.packed) < self.pool:
            self.packed.extend(ids)
            self.packed.append(self.eos)
            self.fingerprints.append(text.fingerprint())
            self.shared_lines |= text.lines() & self.evaluation_lines
        else:
            self.patience -= 1

    def shortage(self) -> list[str]:
        """What is missing, in words."""
        found = []
        if len(self.packed) < self.tokens:
            found.append(
                f"training asks for {self.tokens:_} tokens and has {len(self.packed):_}, from "
                f"{self.documents} documents"
            )
        if len(self.starts) < self.num_starts:
            found.append(
                f"{self.num_starts} streams start from as many training documents of at least "
                f"{self.num_virtual_tokens} tokens, and there are {len(self.starts)} "
                "(method.init=random needs none)"
            )
        return found
