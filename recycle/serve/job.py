"""One request on its way: what is to be generated, and what comes of it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from .requests import RequestError


@dataclass(frozen=True)
class Order:
    """What the worker is to generate."""

    p: int
    ids: list[int]  # of the prompt
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: list[str]


@dataclass(frozen=True)
class End:
    """How a text ended."""

    reason: Literal["stop", "length"]
    tokens: int
    """That were generated, with those of a stop or an end of text."""


class Job:
    """A request's answer: its pieces of text, then its `End`, or the error that ended it."""

    order: Order
    """Once the text has been tokenized."""

    def __init__(self) -> None:
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | End | RequestError] = asyncio.Queue()

    def put(self, event: str | End | RequestError) -> None:
        """Pass an event on, in the event loop's thread; nothing follows an end."""
        if not self.ended:
            self.ended = not isinstance(event, str)
            self._events.put_nowait(event)

    def send(self, event: str | End | RequestError) -> None:
        """`put`, from the worker's thread."""
        if not self.ended:  # else the loop may be closed
            self._loop.call_soon_threadsafe(self.put, event)

    async def events(self) -> AsyncIterator[str | End]:
        """The pieces of text as they come, and the end; raises the error."""
        event: str | End | RequestError = ""
        while not isinstance(event, End):
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            yield event
