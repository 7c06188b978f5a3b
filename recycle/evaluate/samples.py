"""How every row goes on with a few prompts: no number, but what a reader can look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from recycle.data import IGNORED, Document
from recycle.parscale import ActiveStreams, choose_streams
from recycle.results import Sample

from .answers import decode_replies

PROMPT_TOKENS, REPLY_TOKENS = 32, 32
MOST = 2048  # tokens of a prompt and its reply, where the backbone names no window


@dataclass
class Samples:
    """Prompts from test documents, and the replies of the rows so far, by greedy decoding."""

    prompts: list[list[int]]
    replies: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(documents: Sequence[Document], count: int) -> "Samples":
        """Prompts from the first documents: of a conversation what is asked, else its beginning."""
        return Samples([_prompt(document) for document in documents[:count]])

    def take(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, ActiveStreams | None],
    ) -> None:
        """Let every row go on with the prompts, all of them in one batch."""
        if not self.prompts:
            return
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MOST
        new = min(REPLY_TOKENS, window // 2)
        prompts = [ids[-(window - new) :] for ids in self.prompts]
        for name, active in rows.items():
            with choose_streams(model, active):
                said = decode_replies(model, tokenizer, prompts, new)
            self.replies[name] = [tokenizer.decode(ids) for ids in said]

    def records(
        self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
    ) -> tuple[Sample, ...]:
        """For the record of the run, with the rows in the order of `names`."""
        return tuple(
            Sample(
                prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                replies={name: self.replies[name][number] for name in names},
            )
            for number, prompt in enumerate(self.prompts)
        )


def _prompt(document: Document) -> list[int]:
    ids, labels = document.input_ids, document.labels
    if document.prompt_ids is not None:
        return document.prompt_ids
    answered = next(i for i, label in enumerate(labels) if label != IGNORED)
    return ids[: answered or min(PROMPT_TOKENS, len(ids) // 2)]
