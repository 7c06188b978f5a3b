"""One reading of a data section: documents go to the splits that lack them."""

from collections import Counter
from itertools import pairwise
from typing import Any

from recycle.progress import Silent
from recycle.recipe import Data

from .advice import Shortage
from .encoding import Encoder
from .evaluation import COPY, DOCUMENTS_PER_GROUP, OVERLAP, TRAINED_ON, EvaluationSplit, Holders
from .mix import own_test, parts_of
from .packing import Row
from .text import besides, sha256
from .training import TrainingSplit

_SETTINGS = {"block_size", "validation_documents", "test_documents", "test_path", "seed"}


class Reading:
    """Splits of one data section; the trainings of two stages follow one another.

    Args:
        data: The section.
        encoder: Of the backbone's tokenizer.
        trainings: Those that learn from it.
        holders: Documents of validation and test, of every reading.
        split_of: Origin and group -> its split, of every reading.
        with_test: Whether test documents are taken from it.
    """

    def __init__(
        self,
        data: Data,
        encoder: Encoder,
        trainings: list[TrainingSplit],
        holders: Holders,
        split_of: dict[tuple[str, str], EvaluationSplit | TrainingSplit],
        with_test: bool,
    ) -> None:
        self.data = data
        self.encoder = encoder
        self.trainings = trainings
        for earlier, later in pairwise(trainings):
            later.earlier = earlier
        wanted = data.test_documents if with_test else 0
        own = with_test and data.test_path is not None
        self.test = EvaluationSplit("test", wanted, data.block_size, holders, own)
        self.validation = EvaluationSplit(
            "validation", data.validation_documents, data.block_size, holders
        )
        self.parts = parts_of(data, encoder)
        self.test_facts: dict[str, Any] = {}
        self.split_of = split_of
        # What other settings leave as it is: groups of one name are the same.
        self.origin = data.model_dump_json(exclude=_SETTINGS)

    def gather(self) -> None:
        """Read until there are enough candidates for test and validation."""
        for split in (self.test, self.validation):
            if split.own:
                self._read_own_test()
            while not split.full and not split.own and self._read(split):
                pass
            split.closed = True  # training may begin

    def train(self, progress: Silent) -> None:
        """Go on until every training has enough."""
        for split in self.trainings:
            more = True
            while more and not split.full:
                before = split.packing.size
                more = self._read(split)
                progress.advance(min(split.packing.size, split.pool) - min(before, split.pool))

    def _read_own_test(self) -> None:
        skipped: Counter[str] = Counter()
        for document in own_test(self.data, self.encoder, self.test_facts, skipped):
            self.test.add(document)
            self.test.groups.add(document.text.group)
            if self.data.group_field is not None:  # else a group is a name in that file only
                self.split_of[self.origin, document.text.group] = self.test
            if self.test.full:
                break
        self.test_facts["skipped"] = dict(skipped)

    def _read(self, split: EvaluationSplit | TrainingSplit) -> bool:
        """Give one document to the split of its group, which is `split` if it is a new one.

        It comes from the part that lags most behind its weight. False where that one has no more.
        """
        part = min(self.parts, key=lambda part: split.by_part[part.name] / part.weight)
        document = next(part.documents, None)
        if document is None:
            part.dry = True
            return False
        target = self.split_of.setdefault((self.origin, document.text.group), split)
        if isinstance(target, TrainingSplit):
            target = split  # an earlier stage's has enough
        target.groups.add(document.text.group)
        target.by_part[part.name] += target.add(document)
        return True

    def keep(self, training_lines: set[str]) -> None:
        """Take the evaluation documents that share few enough lines with any training.

        Raises:
            Shortage: Something is missing.
        """
        for evaluation in (self.test, self.validation):
            evaluation.keep(training_lines)
        missing = self.test.shortage() | self.validation.shortage()
        for split in self.trainings:
            for key, told in split.shortage().items():
                missing[key] = f"{missing[key]}; {told}" if key in missing else told
        if missing:
            dry = [part for part in self.parts if part.name and part.dry]
            missing |= {f"mix.{part.name}": part.ran_dry() for part in dry}
            documents = self.test.documents + self.validation.documents
            raise Shortage(
                self.data,
                missing,
                sum(split.packing.num_rows for split in self.trainings),
                documents + sum(split.documents for split in self.trainings),
                besides(self.skipped()),
            )

    def skipped(self) -> Counter[str]:
        return sum((part.skipped for part in self.parts), Counter())

    def facts(self, training: TrainingSplit, rows: list[Row]) -> dict[str, Any]:
        """What was read, left out and kept for a stage; plain JSON."""
        data, evaluations = self.data, (self.test, self.validation)
        splits: tuple[TrainingSplit | EvaluationSplit, ...] = (training, *reversed(evaluations))
        used = {x.name: [kept.text.fingerprint() for kept in x.kept] for x in evaluations}
        used |= {"train": training.used}
        used |= {"starts": [text.fingerprint() for text, _ in training.starts]}
        packing = training.packing
        return {
            **self._source(training),
            "skipped": dict(self.skipped()),
            "documents_read": {split.name: split.documents for split in splits},
            "groups_read": {split.name: len(split.groups) for split in splits},
            "documents_used": {name: len(prints) for name, prints in used.items()},
            "documents_per_evaluation_group": DOCUMENTS_PER_GROUP,
            "overlap_limit": OVERLAP,
            "overlap_removed": {split.name: split.left_out[TRAINED_ON] for split in splits[1:]},
            "copies_removed": {split.name: split.left_out[COPY] for split in splits},
            "block_size": data.block_size,
            "tokens": {split.name: split.tokens() for split in evaluations}
            | {"train": sum(len(row.ids) for row in rows), "train_pool": packing.size},
            **({"borrowed_rows": n} if (n := training.num_borrowed) else {}),
            "start_texts": [text.name for text, _ in training.starts],
            "sha256": {name: sha256("\n".join(sorted(prints))) for name, prints in used.items()},
            **({"chat": _chat_facts(training, rows)} if any(x.examples for x in rows) else {}),
        }

    def _source(self, training: TrainingSplit) -> dict[str, Any]:
        found: dict[str, Any] = {"source": self.data.source, "seed": self.data.seed}
        if self.data.source == "mix":
            found["parts"] = {
                part.name: part.facts
                | {"weight": part.weight, "skipped": dict(part.skipped)}
                | {"train_pool_tokens": training.by_part[part.name]}
                for part in self.parts
            }
        else:
            found |= self.parts[0].facts
        return found | ({"test_file": self.test_facts} if self.test.own else {})


def _chat_facts(training: TrainingSplit, rows: list[Row]) -> dict[str, int]:
    return {
        "examples": sum(row.examples for row in rows),
        "learned_tokens": sum(row.learned for row in rows),
        "padding": sum(row.padding for row in rows),
        **{name: training.chat[name] for name in ("examples_cut", "conversations_apart")},
    }
