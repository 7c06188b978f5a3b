"""From a request to an order: its model's P and its text as tokens, within the limits."""

import copy
import secrets
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from recycle.family.switch import available_p

from .job import Order
from .requests import ChatRequest, CompletionRequest, RequestError


class Orders:
    """Takes requests for one family.

    Special tokens that are written out in a text are read as such, as transformers' tokenizers do:
    whoever writes a message can end its turn.

    A text that must be longer than the window is refused before it is tokenized, by its characters:
    no token is longer than the vocabulary's longest. Of a model without a window only the size of a
    request's body limits the text (see `Gate`).

    Args:
        name: Of the family; its models are `name:p1`, `name:p2`, …
        model: As `recycle.load` gives it.
        tokenizer: Copied, since a tokenizer is not to be used from two threads.
        max_new_tokens: The most that a request may ask for, and what it gets where it does not say.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
    ) -> None:
        self.models = {f"{name}:p{p}": p for p in available_p(model)}
        self.tokenizer = copy.deepcopy(tokenizer)
        self.max_new_tokens = max_new_tokens
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # characters

    def p_of(self, model: str) -> int:
        """The P behind a model's name."""
        if model not in self.models:
            served = ", ".join(self.models)
            message = f"There is no model {model!a:.100} here; served are {served}."
            raise RequestError(404, message, "model", "model_not_found")
        return self.models[model]

    def take(self, request: ChatRequest | CompletionRequest) -> Order:
        """The order of a request.

        Raises:
            RequestError: The model is not served, there is no chat template or it refuses the
                messages, or the characters or tokens are none or too many.
        """
        p, limit = self.p_of(request.model), self.max_new_tokens
        if request.max_tokens is not None and request.max_tokens > limit:
            rule = f"max_tokens must be at most {limit} here, got {request.max_tokens}."
            raise RequestError(400, rule, "max_tokens")
        chat = isinstance(request, ChatRequest)
        text = self._chat_text(request) if isinstance(request, ChatRequest) else request.prompt
        field = "messages" if chat else "prompt"
        if self.window is not None and len(text) > self.window * self.longest_token:
            raise self._too_long(field, f"{len(text)} characters of the {field}")
        ids: list[int] = self.tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise RequestError(400, f"{field} must have tokens, got none.", field)
        room = limit if self.window is None else self.window - len(ids)
        if room < (request.max_tokens or 1):
            parts = f"{len(ids)} tokens of the {field} and {request.max_tokens or 1} to generate"
            raise self._too_long(field, parts)
        return Order(
            p,
            ids,
            request.max_tokens or min(limit, room),
            request.temperature,
            request.top_p,
            secrets.randbits(63) if request.seed is None else request.seed,
            request.stop,
        )

    def _too_long(self, field: str, parts: str) -> RequestError:
        rule = f"{parts} are more than the model's window of {self.window} tokens; ask for less."
        return RequestError(400, rule, field, "context_length_exceeded")

    def _chat_text(self, request: ChatRequest) -> str:
        if self.tokenizer.chat_template is None:
            rule = "The tokenizer has no chat template, so there are no chats: use /v1/completions."
            raise RequestError(400, rule, "messages")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            rule = f"The model's chat template does not take these messages: {error}"
            raise RequestError(400, rule, "messages") from None
