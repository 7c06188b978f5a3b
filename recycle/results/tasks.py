"""What `recycle eval` adds to a record: tasks and losses on other data, document by document."""

from collections.abc import Mapping
from datetime import datetime

from pydantic import AwareDatetime, JsonValue, PositiveInt, model_validator

from .comparison import Difference, paired_difference, token_mean
from .record import Loss, Record


class TaskResult(Record):
    """One task, or the loss on one set of documents, under each row that was measured on it."""

    name: str
    """The task ("arithmetic", "humaneval"), or what the documents are ("notes.md")."""
    metric: str
    """What each value is: "acc", "exact_match", "pass@1", "loss" in nats per token, ..."""
    higher_is_better: bool
    settings: dict[str, JsonValue]
    """All that decides a value but the row: number of documents, few-shot examples, seed, the
    task's version or hash, the precision. Values under other settings are not comparable."""
    date: AwareDatetime
    command: str
    tokens: tuple[PositiveInt, ...] | None = None
    """Weight of each document, its predicted tokens; None where every document counts the same."""
    scores: dict[str, tuple[Loss, ...]]
    """Name of a row in the table -> the value of each document, in the same order in all rows."""

    @model_validator(mode="after")
    def _same_documents(self) -> "TaskResult":
        lengths = {name: len(values) for name, values in self.scores.items()}
        if self.tokens is not None:
            lengths["tokens"] = len(self.tokens)
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"the rows of {self.name!r} must be of the same documents: {lengths}")
        return self

    @property
    def weights(self) -> tuple[int, ...]:
        """What each document counts."""
        return self.tokens or (1,) * len(next(iter(self.scores.values())))

    def mean(self, row: str) -> float:
        """The mean over documents."""
        return token_mean(self.scores[row], self.weights)

    def difference(self, row: str, other: str) -> Difference:
        """Row minus other, paired over documents."""
        return paired_difference(self.scores[row], self.scores[other], self.weights)

    def same_measurement(self, other: "TaskResult") -> bool:
        """Whether rows of both can stand in one table."""
        mine, theirs = ((x.name, x.metric, x.settings, x.tokens) for x in (self, other))
        return mine == theirs

    def merged(self, scores: Mapping[str, tuple[float, ...]], date: datetime) -> "TaskResult":
        """With the scores of further rows, or of the same ones measured again."""
        return self.model_copy(update={"scores": self.scores | dict(scores), "date": date})


class Sample(Record):
    """One prompt, and how each row goes on with it by greedy decoding."""

    prompt: str
    replies: dict[str, str]
    """Name of a row in the table -> text."""
