"""Validation and test: what they take, and what is left out for sharing its lines."""

from collections import Counter
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .chat import prompt_ids
from .encoding import Encoded, learned
from .text import Text

SURPLUS = 1.25  # documents gathered for each one wanted, since some leave
DOCUMENTS_PER_GROUP = 4  # documents of one group, at most
OVERLAP = 0.3  # share of a document's lines that others may hold
# Why documents are left out, in words.
COPY = "near copies of others"
TRAINED_ON = f"with over {OVERLAP:.0%} of their lines in training"


@dataclass(frozen=True)
class Document:
    """The first block of one document, for evaluation."""

    name: str
    group: str
    input_ids: list[int]  # block_size of them; a conversation may have fewer
    labels: list[int]  # the same, or -100 where nothing is to be predicted
    num_bytes: int  # UTF-8 bytes of the text of the predicted tokens
    prompt_ids: list[int] | None = None  # tasks: what is asked, as at inference
    answer: str | None = None  # tasks: the right one

    @property
    def predicted_tokens(self) -> int:
        return len(learned(self.labels))


class Holders:
    """The documents of validation and test so far, by their lines."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # distinct lines of each document
        self.of_line: dict[str, list[int]] = {}
        self.digests: set[str] = set()  # of whole documents: a short one has no line that counts

    def holds(self, text: Text) -> bool:
        return text.digest in self.digests

    def shared(self, lines: set[str]) -> list[tuple[int, int]]:
        """Of each document with some of these lines, how many it shares and how many it has."""
        shared = Counter(number for line in lines for number in self.of_line.get(line, ()))
        return [(count, self.sizes[number]) for number, count in shared.items()]

    def add(self, text: Text) -> None:
        lines = text.lines()
        for line in lines:
            self.of_line.setdefault(line, []).append(len(self.sizes))
        self.sizes.append(len(lines))
        self.digests.add(text.digest)


@dataclass
class EvaluationSplit:
    """Candidates of validation or test."""

    name: str
    wanted: int
    block_size: int
    holders: Holders
    own: bool = False  # a file of the user's: all of it is taken, be it fewer than wanted
    of_text: bool = True  # no conversation was among them
    closed: bool = False  # takes no more
    documents: int = 0
    groups: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)  # why, in words
    pool: list[Encoded] = field(default_factory=list)
    by_group: Counter[str] = field(default_factory=Counter)
    by_part: Counter[str] = field(default_factory=Counter)  # documents, of each part of a mix
    kept: list[Encoded] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.closed or len(self.pool) >= round(self.wanted * (1 if self.own else SURPLUS))

    def add(self, document: Encoded) -> int:
        """Take a document or leave it out; how many were taken."""
        text = document.text
        self.documents += 1
        self.of_text &= not document.examples
        if self.full:
            return 0
        lines = text.lines()
        if not document.examples and len(document.ids) < self.block_size:
            self.left_out["shorter"] += 1
        elif self.by_group[text.group] >= DOCUMENTS_PER_GROUP and not self.own:
            self.left_out[f"beyond the first {DOCUMENTS_PER_GROUP} of their group"] += 1
        elif self.holders.holds(text) or any(
            n > OVERLAP * len(lines) for n, _ in self.holders.shared(lines)
        ):
            self.left_out[COPY] += 1
        else:
            self.holders.add(text)
            self.by_group[text.group] += 1
            self.pool.append(document)
            return 1
        return 0

    def keep(self, training_lines: set[str]) -> None:
        """Take the wanted number of candidates that share few enough lines with training."""
        for document in self.pool:
            lines = document.text.lines()
            if len(lines & training_lines) > OVERLAP * len(lines):
                self.left_out[TRAINED_ON] += 1
            elif len(self.kept) < self.wanted:
                self.kept.append(document)

    def shortage(self) -> dict[str, str]:
        """What is missing, in words."""
        needed = 2 if self.own else self.wanted
        if len(self.kept) >= needed:
            return {}
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        length = f" of at least {self.block_size} tokens" if self.of_text else ""
        told = (
            f"{self.name} asks for {needed} documents{length} and has {len(self.kept)}, from "
            f"{self.documents} documents in {len(self.groups)} groups"
        )
        return {self.name: told + (f" ({left_out})" if left_out else "")}

    def tokens(self) -> int:
        return sum(len(x.evaluated(self.block_size).input_ids) for x in self.kept)

    def results(self, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        return [_document(document, self.block_size, tokenizer) for document in self.kept]


def _document(document: Encoded, block_size: int, tokenizer: PreTrainedTokenizerBase) -> Document:
    text, (ids, labels) = document.text, document.evaluated(block_size)
    predicted = tokenizer.decode(
        learned(labels), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    asked = None
    if text.answer is not None and text.conversation is not None:
        asked = prompt_ids(text.conversation, tokenizer)
    size = len(predicted.encode())
    return Document(text.name, text.group, ids, labels, size, asked, text.answer)
