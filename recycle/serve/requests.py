"""What a request may say. A field that would be passed over in silence is refused instead."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from recycle.errors import RecycleError

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class RequestError(RecycleError):
    """A request that is not answered, or not to its end.

    Args:
        status: Of HTTP.
        message: The rule, the value and what would be right.
        param: The field of the request.
        code: OpenAI's word for it, where clients look for one.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Strict(BaseModel):
    """No unknown field and no conversion of types; null is a field that was not given."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        given = {field: value for field, value in data.items() if value is not None}
        if unknown := sorted(given.keys() - cls.model_fields.keys()):
            rule = "not supported here; the fields are {fields}"
            name = ascii(unknown[0])[1:-1][:100]  # a lone surrogate could not be sent back
            context = {"field": name, "fields": ", ".join(cls.model_fields)}
            raise PydanticCustomError("unknown_field", rule, context)
        return given


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_as_parts)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


class Request(Strict):
    """What both kinds of request share, with OpenAI's defaults."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Request":
        if self.stream_options and not self.stream:
            rule = "needs stream: true, got stream: false"
            raise PydanticCustomError("stream_options", rule, {"field": "stream_options"})
        return self


class CompletionRequest(Request):
    prompt: str = Field(min_length=1)


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_completion_tokens is None:
            return self
        if self.max_tokens is not None:
            rule = "the old name of max_completion_tokens; give one of them"
            raise PydanticCustomError("two_limits", rule, {"field": "max_tokens"})
        self.max_tokens = self.max_completion_tokens
        return self


def problem(errors: Sequence[Any]) -> RequestError:
    """The first of pydantic's errors, in words: the field, the rule and the value."""
    error = errors[0]
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return RequestError(400, f"The body must be JSON: {context['error']}.")
    place = [*error["loc"][1:], *([context["field"]] if "field" in context else [])]
    names = (f"[{name}]" if isinstance(name, int) else f".{name}" for name in place)
    param = "".join(names).removeprefix(".") or None
    told = error["type"] == "missing" or "field" in context
    value = "" if told else f", got {error['input']!a:.100}"
    return RequestError(400, f"{param or 'The body'}: {error['msg']}{value}.", param)
