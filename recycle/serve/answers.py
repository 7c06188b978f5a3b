"""OpenAI's forms: what a client gets, whole, in pieces, or as an error."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from .job import End, Job
from .requests import RequestError

Reason = Literal["stop", "length"] | None
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(BaseModel):
    """The body of an error."""

    error: ErrorObject


def refusal(error: RequestError) -> str:
    """An error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else KINDS.get(error.status)
    fields: dict[str, Any] = {"message": error.message, "param": error.param, "code": error.code}
    return dump(Refusal(error=ErrorObject(type=kind or "invalid_request_error", **fields)))


class Answer:
    """The answer to one request, whole or as the events of a stream.

    Args:
        model: Its name.
        job: Brings it.
        chat: Whether it is a chat's; else a completion's.
    """

    def __init__(self, model: str, job: Job, chat: bool) -> None:
        self.job, self.chat = job, chat
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}

    async def whole(self) -> str:
        """The answer as one, at its end; raises the job's error."""
        text = ""
        async for event in self.job.events():
            if isinstance(event, str):
                text += event
            else:
                end = event
        choice: dict[str, Any] = {"index": 0, "finish_reason": end.reason, "logprobs": None}
        body: dict[str, Any] = self.head | {"usage": self._usage(end)}
        if self.chat:
            message = ChatCompletionMessage(role="assistant", content=text, refusal=None)
            choices = [Choice(message=message, **choice)]
            return dump(ChatCompletion(object="chat.completion", choices=choices, **body))
        texts = [CompletionChoice(text=text, **choice)]
        return dump(Completion(object="text_completion", choices=texts, **body))

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events; an error is the last but one, and [DONE] the last."""
        if with_usage:
            self.head["usage"] = None
        try:
            if self.chat:
                yield self._chunk({"role": "assistant", "content": ""})
            async for event in self.job.events():
                if isinstance(event, str):
                    yield self._chunk({"content": event})
                    continue
                yield self._chunk({}, event.reason)
                if with_usage:
                    self.head["usage"] = self._usage(event)
                    yield self._chunk(None)
        except RequestError as error:
            yield _event(refusal(error))
        yield _event("[DONE]")

    def _chunk(self, delta: dict[str, Any] | None, reason: Reason = None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            deltas = [] if delta is None else [ChunkChoice(delta=ChoiceDelta(**delta), **choice)]
            kind: Any = {"object": "chat.completion.chunk", "choices": deltas}
            return _event(dump(ChatCompletionChunk(**kind, **self.head)))
        # The type of a choice is that of a whole answer, which always has a reason.
        text = None if delta is None else delta.get("content", "")
        texts = [] if text is None else [CompletionChoice.model_construct(text=text, **choice)]
        kind = {"object": "text_completion", "choices": texts}
        return _event(dump(Completion.model_construct(**kind, **self.head)))

    def _usage(self, end: End) -> CompletionUsage:
        prompt = len(self.job.order.ids)
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=end.tokens,
            total_tokens=prompt + end.tokens,
        )


def dump(body: BaseModel) -> str:
    """JSON with the fields that were set."""
    return body.model_dump_json(exclude_unset=True, warnings=False)


def _event(data: str) -> str:
    return f"data: {data}\n\n"
