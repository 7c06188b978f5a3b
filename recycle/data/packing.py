"""Documents -> training rows: texts end to end, examples of conversations side by side."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import datasets
import numpy as np

from .chat import Example
from .encoding import Encoded
from .text import IGNORED

OPEN_ROWS = 16  # that an example may still go into; more of them leave less padding

_none = partial(array, "i")  # makes an array without an element


@dataclass(eq=False)
class Row:
    """Examples one after the other; the first token of each has no label."""

    ids: "array[int]" = field(default_factory=_none)
    labels: "array[int]" = field(default_factory=_none)
    positions: "array[int]" = field(default_factory=_none)  # start again at 0 with each example
    examples: int = 0
    padding: int = 0

    @property
    def learned(self) -> int:
        """Tokens of conversations that are learned."""
        return sum(label != IGNORED for label in self.labels) if self.examples else 0

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.ids.extend(ids)
        self.labels.extend([IGNORED, *labels[1:]])
        self.positions.extend(range(len(ids)))
        self.examples += 1


@dataclass
class Packing:
    """Rows of `block_size` tokens; where nothing can be packed, an example is a row of its own.

    A text ends with the end-of-sequence token, and all texts together are cut into rows. Examples
    are never cut: each goes into the first open row that has room, and the rest is padding.
    """

    block_size: int
    end: int  # token after a text
    pad: int
    packs: bool  # the backbone keeps packed sequences apart
    holds_chat: bool  # rows of texts among them have positions as well
    texts: "array[int]" = field(default_factory=_none)
    rows: list[Row] = field(default_factory=list)
    open: list[Row] = field(default_factory=list)  # those with room, the older ones first

    @property
    def size(self) -> int:
        """Tokens, where each row of examples counts as `block_size`."""
        return len(self.texts) + self.block_size * len(self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.texts) // self.block_size + len(self.rows)

    def add(self, document: Encoded) -> int:
        """Take a document; the number of its tokens."""
        for example in document.examples:
            self._add(example)
        if document.examples:
            return sum(len(example.input_ids) for example in document.examples)
        self.texts.extend(document.ids)
        self.texts.append(self.end)
        return len(document.ids) + 1

    def _add(self, example: Example) -> None:
        ids, labels = example
        fitting = (row for row in self.open if len(row.ids) + len(ids) <= self.block_size)
        row = next(fitting, None)
        if row is None:
            row = Row()
            self.rows.append(row)
            self.open.append(row)
        row.add(ids, labels)
        if len(row.ids) == self.block_size or not self.packs:
            self.open.remove(row)
        elif len(self.open) > OPEN_ROWS:
            self.open.remove(max(self.open, key=lambda row: len(row.ids)))

    def take(self, numbers: Iterable[int]) -> list[Row]:
        """The rows with these numbers, padded; first come those of texts."""
        size = self.block_size
        whole, positions = len(self.texts) // size, array("i", range(size))
        taken = []
        for number in numbers:
            if number < whole:
                ids = self.texts[number * size : (number + 1) * size]
                taken.append(Row(ids, ids, positions))
            else:
                taken.append(self._padded(self.rows[number - whole]))
        return taken

    def _padded(self, row: Row) -> Row:
        rest = self.block_size - len(row.ids) if self.packs else 0
        if not rest:
            return row
        return Row(
            row.ids + array("i", [self.pad] * rest),
            row.labels + array("i", [IGNORED] * rest),
            row.positions + array("i", range(rest)),
            row.examples,
            rest,
        )

    def table(self, rows: list[Row]) -> datasets.Dataset:
        """Rows as a table in memory, so that nothing stays in the user's cache."""
        columns = {"input_ids": [np.array(row.ids) for row in rows]}
        columns["labels"] = [np.array(row.labels) for row in rows]
        if self.packs and self.holds_chat:
            columns["position_ids"] = [np.array(row.positions) for row in rows]
        features = datasets.Features(dict.fromkeys(columns, datasets.List(datasets.Value("int32"))))
        return datasets.Dataset.from_dict(columns, features=features)
