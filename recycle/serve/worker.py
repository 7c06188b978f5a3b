"""The one thread that generates. Requests wait for it in a queue, and each can end early."""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from recycle.backbone.generation import decoding
from recycle.family.switch import use_p
from recycle.world import own_random_state

from .job import Job
from .reader import Reader
from .requests import RequestError

log = logging.getLogger(__name__)


class Worker:
    """Runs a family's model in a thread of its own, so that two P never meet on one backbone.

    Args:
        model: As `recycle.load` gives it.
        tokenizer: No other thread may use it.
        places: Requests that may wait, those included whose text is being tokenized.
        warm: Values of P to compile before the first job, where the model compiles.
        max_new_tokens: What a request with a short prompt asks for, which they are compiled for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        places: int,
        warm: Sequence[int] = (),
        max_new_tokens: int = 1,
    ) -> None:
        self.model, self.tokenizer, self.places = model, tokenizer, places
        self.warm, self.max_new_tokens = warm, max_new_tokens
        self.entering: set[Job] = set()  # they have no order yet
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.stopped = False
        self._turn = threading.Condition()
        # A daemon, since nothing can interrupt a forward pass.
        self.thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self.thread.start()

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return len(self.entering) + len(self.waiting)

    @contextmanager
    def place(self) -> Iterator[Job]:
        """A place for a job while its order is made; raises `RequestError` where there is none."""
        with self._turn:
            if self.stopped:
                raise RequestError(503, "The server is stopping.")
            if self.taken >= self.places:
                rule = f"{self.places} requests wait already, which is the most; try again later."
                raise RequestError(429, rule, code="queue_full")
            self.entering.add(job := Job())
        try:
            yield job
        finally:
            self.entering.remove(job)

    def submit(self, job: Job) -> None:
        """Put a job into the queue, now that it has its order; one that has ended is left out."""
        with self._turn:
            if not job.ended:
                self.waiting.append(job)
                self._turn.notify()

    def cancel(self, job: Job) -> None:
        """End a job now, or at its next token where it is running."""
        job.put(RequestError(499, "The client went away."))
        with self._turn:
            if job in self.waiting:
                self.waiting.remove(job)

    def stop(self) -> None:
        """End every job and the thread."""
        with self._turn:
            self.stopped = True
            for job in (*self.entering, *self.waiting, *([self.running] if self.running else [])):
                job.put(RequestError(503, "The server is stopping."))
            self.waiting.clear()
            self._turn.notify()

    def _work(self) -> None:
        try:
            self._warm_up()
        except Exception:
            log.exception("Compiling ahead failed.")
        while True:
            with self._turn:
                self.running = None
                self._turn.wait_for(lambda: self.waiting or self.stopped)
                if self.stopped:
                    return
                job = self.running = self.waiting.popleft()
            try:
                self._generate(job)
            except Exception:
                log.exception("A request failed.")
                job.send(RequestError(500, "Generation failed; the server's log says why."))

    def _warm_up(self) -> None:
        """Generate a token with each P; `generate` compiles before that for the whole length."""
        ids = torch.ones((1, 1), dtype=torch.long, device=self.model.device)
        length: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "max_time": 0.0}
        for p in self.warm:
            if self.model.compiles is False or self.stopped:
                return
            with use_p(self.model, p), decoding(self.model):
                self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)

    def _generate(self, job: Job) -> None:
        order, model = job.order, self.model
        ids = torch.tensor([order.ids], device=model.device)
        with (
            use_p(model, order.p),
            decoding(model, order.temperature, order.top_p),
            own_random_state(model.device),
        ):
            torch.manual_seed(order.seed)
            reader = Reader(self.tokenizer, model.generation_config.eos_token_id, job)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=order.max_tokens,
                stopping_criteria=StoppingCriteriaList([reader]),
            )
        reader.finish()
