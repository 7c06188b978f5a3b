"""How text is told from tokens as they are generated, and where it stops."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from .job import End, Job

UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class Reader(StoppingCriteria):
    """Sends a job's text on while it is generated, and says when generation is to stop.

    Text that may still become another character or a stop is held back.

    Args:
        tokenizer: Of the model.
        ends: Tokens that end a text.
        job: Gets the text; generation stops where it has ended.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None, job: Job
    ) -> None:
        self.tokenizer, self.job = tokenizer, job
        self.ends = [ends] if isinstance(ends, int) else ends or []
        self.text, self.sent, self.tokens = "", 0, 0
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """After each token: the whole row [1, S]. Returns whether it is done, [1]."""
        if not self.job.ended:
            self._read(input_ids[0, len(self.job.order.ids) :].tolist())
        done = self.stopped or self.job.ended
        return torch.full((1,), done, device=input_ids.device, dtype=torch.bool)

    def finish(self) -> None:
        """Send what was held back, and how it ended."""
        self._send(len(self.text))
        self.job.send(End("stop" if self.stopped else "length", self.tokens))

    def _read(self, ids: list[int]) -> None:
        self.tokens = len(ids)
        if ids[-1] in self.ends:
            self.stopped = True
            ids = ids[:-1]
        self.text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        stops = self.job.order.stops
        if found := [place for stop in stops if (place := self.text.find(stop)) >= 0]:
            self.stopped = True
            self.text = self.text[: min(found)]
        whole = self.text.rstrip(UNFINISHED)
        held = (n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        self._send(len(whole) - max(held, default=0))

    def _send(self, until: int) -> None:
        if until > self.sent:
            self.job.send(self.text[self.sent : until])
            self.sent = until
