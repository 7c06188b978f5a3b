"""What every row of the table can be measured on besides its test documents.

An exam is taken by one row after the other, and gives a value of each document; whatever decides
the values but the row stands in its settings.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from recycle.data import Document
from recycle.data.chat import prompt_ids
from recycle.data.mix import as_conversation
from recycle.data.tasks import make_tasks
from recycle.parscale import ActiveStreams

from .answers import Question, answers_right
from .head import OutputHead
from .humaneval import NEW_TOKENS, STOPS, TEMPERATURE, TOP_P, read_problems, write_programs
from .losses import document_losses
from .passes import Pass

ROW = "row"
QUESTIONS, QUESTIONS_SEED = 96, 20261  # of the task `answers`; no recipe has that seed


class Scores(NamedTuple):
    """One metric of an exam, document by document."""

    metric: str
    higher_is_better: bool
    values: tuple[float, ...]
    tokens: tuple[int, ...] | None = None  # weights of the documents, where they differ


class Exam(Protocol):
    """Something that every row is measured on."""

    name: str
    settings: dict[str, JsonValue]

    @property
    def amount(self) -> int:
        """Of what `advance` counts."""

    def take(
        self, model: Any, active: ActiveStreams | None, advance: Callable[[int], None]
    ) -> list[Scores]:
        """The scores of a model, in eval mode, with these streams."""


def digest(of: Any) -> str:
    """A short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(of, default=str).encode()).hexdigest()[:16]


@dataclass
class LossExam:
    """The loss on documents that the run knows nothing of."""

    name: str
    documents: Sequence[Document]
    """Blocks, named DOCUMENT#NUMBER."""
    settings: dict[str, JsonValue]
    batch_size: int

    @property
    def amount(self) -> int:
        return sum(len(x.input_ids) for x in self.documents)

    def take(
        self, model: Any, active: ActiveStreams | None, advance: Callable[[int], None]
    ) -> list[Scores]:
        passes = [Pass(active, [ROW])]
        per_token = active.num_streams if active else 1
        with OutputHead(model) as head:
            losses = document_losses(
                head, passes, self.documents, self.batch_size, lambda n: advance(n // per_token)
            )
        # Blocks of one document are no independent ones: its value is that of all its blocks.
        nats, tokens = defaultdict[str, float](float), defaultdict[str, int](int)
        for block, loss in zip(self.documents, losses[ROW], strict=True):
            document = block.name.rpartition("#")[0]
            nats[document] += loss * block.predicted_tokens
            tokens[document] += block.predicted_tokens
        means = tuple(nats[x] / tokens[x] for x in tokens)
        return [Scores("loss", False, means, tuple(tokens.values()))]


class AnswersExam:
    """Made-up questions that a reply answers right or wrong, in the tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        apart: Sequence[tuple[int, int]],
        batch_size: int,
        precision: str,
    ) -> None:
        """Make the questions.

        Args:
            tokenizer: The backbone's.
            apart: Count and seed of the tasks that were trained on, whose questions do not come up.
            batch_size: Questions decoded at once.
            precision: What the backbone computes in.

        Raises:
            DataError: The tokenizer has no chat template.
        """
        self.name, self.amount = "answers", QUESTIONS
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.questions = [
            Question(prompt_ids(as_conversation(task), tokenizer), task.answer)
            for task in make_tasks(QUESTIONS, QUESTIONS_SEED, apart=apart)
        ]
        self.settings: dict[str, JsonValue] = {
            "documents": QUESTIONS,
            "questions": digest(self.questions),
            "precision": precision,
        }

    def take(
        self, model: Any, active: ActiveStreams | None, advance: Callable[[int], None]
    ) -> list[Scores]:
        rows = {ROW: active}
        right = answers_right(
            model, self.tokenizer, rows, self.questions, self.batch_size, advance=advance
        )
        return [Scores("answers right", True, tuple(map(float, right[ROW])))]


class HumanEvalExam:
    """Functions written to pass the tests of HumanEval, which the sandbox runs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        batch_size: int,
        window: int,
        precision: str,
    ) -> None:
        self.name = "humaneval"
        self.tokenizer, self.samples = tokenizer, samples
        self.batch_size, self.window = batch_size, window
        self.problems = read_problems()
        self.amount = samples * len(self.problems)
        sampled: dict[str, JsonValue] = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": 0}
        self.settings: dict[str, JsonValue] = {
            "documents": len(self.problems),
            "problems": digest(self.problems),
            "samples": samples,
            "new_tokens": min(NEW_TOKENS, window // 2),
            "stops": list(STOPS),
            "batch_size": batch_size,
            "precision": precision,
            **(sampled if samples > 1 else {}),
        }

    def take(
        self, model: Any, active: ActiveStreams | None, advance: Callable[[int], None]
    ) -> list[Scores]:
        written = write_programs(
            model,
            self.tokenizer,
            active,
            self.problems,
            self.samples,
            self.batch_size,
            self.window,
            advance,
        )
        return [Scores(metric, True, values) for metric, values in written.scores().items()]
