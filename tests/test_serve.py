"""`recycle serve`: OpenAI's own client against a real server, and what raw HTTP can send wrong."""

import asyncio
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import psutil
import pytest
import torch

from recycle.backbone.fingerprint import fingerprint_model
from recycle.backbone.generation import decoding
from recycle.decode.text import load_here
from recycle.family.adapters import save_family
from recycle.family.switch import get_p, use_p
from recycle.serve import gate
from recycle.serve import server as serving
from recycle.serve.app import create_app
from recycle.serve.job import End, Job
from recycle.serve.orders import Orders
from recycle.serve.reader import Reader
from recycle.serve.requests import RequestError
from recycle.serve.server import ServeError, Server, listen, serve
from recycle.serve.worker import Worker
from tests.adapters import stream_model
from tests.runs import assert_refused, command, environment, recycle
from tests.tiny import save_tiny, tiny_tokenizer

PROMPT = "def merge"
CHAT = [{"role": "user", "content": "the lazy dog"}]
MOST = 64  # tokens of a request
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    backbone, folder = save_tiny(home / "backbone"), home / "demo"
    folder.mkdir()
    save_family(stream_model(adapter_name="nested"), folder, fingerprint_model(backbone))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    return load_here(str(run), None, None)


class Here:
    """A server in a thread of this process."""

    def __init__(
        self, model: Any, tokenizer: Any = None, places: int = 64, key: str | None = None
    ) -> None:
        tokenizer = tokenizer or tiny_tokenizer()
        listener = listen(HOST, 0)
        self.url = f"http://{HOST}:{listener.getsockname()[1]}"
        self.worker = Worker(model, tokenizer, places)
        orders = Orders("demo", model, tokenizer, MOST)
        self.server = Server(create_app(orders, self.worker, key, loopback=True), self.worker)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        self.client = client(self.url)
        self.raw = httpx2.Client(base_url=self.url, timeout=20)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.worker.thread.join(10)
        assert not self.thread.is_alive()
        assert not self.worker.thread.is_alive()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@contextmanager
def here(model: Any, **options: Any) -> Iterator[Here]:
    server = Here(model, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Here]:
    with here(model) as started:
        yield started


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes 0.1 s more, so that a test can act in the middle of an answer."""
    read = Reader._read

    def slowly(self: Reader, ids: list[int]) -> None:
        time.sleep(0.1)
        read(self, ids)

    monkeypatch.setattr(Reader, "_read", slowly)


def until(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def idle(server: Here) -> bool:
    return server.raw.get("/health").json() == {"status": "ok", "running": False, "waiting": 0}


def alone(model: Any, p: int, text: str, tokens: int, **sampling: Any) -> str:
    """What the model itself answers."""
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    seed = sampling.pop("seed", 0)
    with use_p(model, p), decoding(model, **sampling), torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def complete(server: Here, **changes: Any) -> Any:
    fields = {"model": "demo:p4", "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | changes
    return server.client.completions.create(**fields)


def streamed(chunks: Any) -> tuple[str, str]:
    """The text and the reason of a stream's chunks."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    texts = [c.text if hasattr(c, "text") else c.delta.content or "" for c in choices]
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(texts), choices[-1].finish_reason


# ---- what it answers


def test_each_p_is_a_model(server: Here) -> None:
    models = server.client.models.list().data
    assert [model.id for model in models] == ["demo:p1", "demo:p2", "demo:p4"]
    assert server.client.models.retrieve("demo:p2") == models[1]
    assert idle(server)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.8, "seed": 3}])
def test_an_answer_is_what_the_model_gives(
    server: Here, model: Any, p: int, sampling: dict[str, Any]
) -> None:
    shared = {"model": f"demo:p{p}", "max_tokens": 20} | sampling
    expected = alone(model, p, PROMPT, 20, **({"temperature": 1.0} | sampling))
    answer = server.client.completions.create(prompt=PROMPT, **shared)
    assert answer.choices[0].text == expected != ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    count = len(tiny_tokenizer()(PROMPT)["input_ids"])
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": count,
        "completion_tokens": 20,
        "total_tokens": count + 20,
    }
    chunks = server.client.completions.create(prompt=PROMPT, stream=True, **shared)
    assert streamed(chunks) == (expected, "length")

    chat_prompt = "user: the lazy dog\nassistant: "
    expected = alone(model, p, chat_prompt, 20, **({"temperature": 1.0} | sampling))
    parts = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("the la", "zy dog")]}
    ]
    for messages in (CHAT, parts):
        chat = server.client.chat.completions.create(messages=messages, **shared)
        assert chat.choices[0].message.role == "assistant"
        assert chat.choices[0].message.content == expected != ""
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == len(tiny_tokenizer()(chat_prompt)["input_ids"])
    chunks = server.client.chat.completions.create(messages=CHAT, stream=True, **shared)
    assert streamed(chunks) == (expected, "length")


def test_the_answer_goes_back_as_a_message(server: Here) -> None:
    ask = {"model": "demo:p2", "max_tokens": 4}
    message = server.client.chat.completions.create(messages=CHAT, **ask).choices[0].message
    for said in (message, message.model_dump()):  # with nulls for what there is not
        server.client.chat.completions.create(messages=[*CHAT, said, *CHAT], **ask)


def test_usage_in_a_stream(server: Here) -> None:
    for create, ask in (
        (server.client.completions.create, {"prompt": PROMPT}),
        (server.client.chat.completions.create, {"messages": CHAT}),
    ):
        chunks = list(
            create(
                model="demo:p1",
                max_tokens=7,
                stream=True,
                stream_options={"include_usage": True},
                **ask,
            )
        )
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 7
        assert len({chunk.id for chunk in chunks}) == 1
        path = CHAT_PATH if "messages" in ask else TEXT_PATH
        body = {"model": "demo:p1", "max_tokens": 7, "stream": True} | ask
        without = server.raw.post(path, json=body).text
        assert "usage" not in without
        raw = server.raw.post(path, json=body | {"stream_options": {"include_usage": True}}).text
        assert raw.count('"usage":null') == raw.count("data: {") - 1


def test_events_are_what_openai_sends(server: Here) -> None:
    ask = {"model": "demo:p1", "messages": CHAT, "max_tokens": 3, "stream": True}
    answer = server.raw.post("/v1/chat/completions", json=ask)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_sampling(server: Here) -> None:
    before = torch.get_rng_state()

    def sample(**changes: Any) -> str:
        return complete(server, **({"temperature": 1} | changes)).choices[0].text

    greedy = sample(temperature=0)
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=-(2**63)) != sample(seed=2**63 - 1)
    assert len({sample() for _ in range(4)}) == 4  # each with a seed of its own
    assert sample(temperature=1e-300) == sample(top_p=0) == greedy != sample(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    default = server.client.completions.create(model="demo:p4", prompt=PROMPT, seed=5, max_tokens=9)
    assert default.choices[0].text == sample(seed=5, top_p=1, max_tokens=9)


def test_limits(server: Here) -> None:
    ask = {"model": "demo:p1", "messages": CHAT, "temperature": 0}
    create = server.client.chat.completions.create
    assert create(**ask).usage.completion_tokens == MOST
    assert create(max_completion_tokens=3, **ask).usage.completion_tokens == 3
    long = complete(server, prompt="a b" * 505, max_tokens=None)  # what the window leaves
    assert long.usage.prompt_tokens + long.usage.completion_tokens == 1024
    assert long.usage.completion_tokens < MOST


def test_stops(server: Here) -> None:
    whole = complete(server, max_tokens=30).choices[0].text
    assert len(whole) > 20
    for start, length in ((0, 1), (3, 2), (5, 3), (9, 8), (14, 5)):
        stop = whole[start : start + length]
        ask = {"stop": ["never there", stop], "max_tokens": 30}
        answer = complete(server, **ask)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 30
        chunks = complete(server, stream=True, **ask)
        assert streamed(chunks) == (whole[: whole.index(stop)], "stop")
    assert complete(server, stop=whole[-1] + "!", max_tokens=30).choices[0].text == whole
    assert complete(server, stop=[], max_tokens=30).choices[0].text == whole


def test_it_stops_at_the_models_end(
    server: Here, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with use_p(model, 4), decoding(model):
        ids = model.generate(**prompt, max_new_tokens=9)[0, prompt["input_ids"].shape[1] :]
    end = next(n for n in range(3, 9) if ids[n] not in ids[:n])
    settings = model.get_base_model().generation_config
    monkeypatch.setattr(settings, "eos_token_id", [1, int(ids[end])])  # no special token
    answer = complete(server)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(ids[:end])
    assert answer.usage.completion_tokens == end + 1


def pieces(text: str, stops: list[str]) -> list[str | End]:
    """What a reader sends of a text that comes token by token."""
    tokenizer, sent = tiny_tokenizer(), []
    job: Any = SimpleNamespace(ended=False, send=sent.append, order=SimpleNamespace())
    job.order.ids, job.order.stops = [5, 6], stops
    reader, ids = Reader(tokenizer, None, job), torch.tensor([[5, 6]])
    for token in tokenizer(text)["input_ids"]:
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if reader(ids, None):
            break
    reader.finish()
    return sent


def test_characters_and_stops_over_token_borders() -> None:
    text = "x = 'né 😀🎉' # end"
    *sent, end = pieces(text, [])
    assert "".join(sent) == text
    assert not any("\ufffd" in piece for piece in sent)
    assert end == End("length", len(tiny_tokenizer()(text)["input_ids"]))
    *sent, end = pieces(text, ["🎉' #", "😀🎈"])
    assert "".join(sent) == "x = 'né 😀"
    assert end.reason == "stop"
    assert "".join(pieces("ababac", ["abac"])[:-1]) == "ab"
    assert "".join(pieces("ababa", ["abac"])[:-1]) == "ababa"  # held back, then sent
    assert len(tiny_tokenizer()("left")["input_ids"]) == 1
    assert "".join(pieces("left", ["ft", "ef"])[:-1]) == "l"  # the first in the text
    assert "".join(pieces("😀 ok"[:1] + "\ufffd", [])[:-1]) == "😀\ufffd"


# ---- what it refuses

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
MESSAGE = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (TEXT_PATH, {"n": 2}, "n", "less than or equal to 1, got 2"),
    (TEXT_PATH, {"logprobs": 1}, "logprobs", "not supported here; the fields are model"),
    (CHAT_PATH, {"logprobs": False}, "logprobs", "not supported"),
    (CHAT_PATH, {"tools": []}, "tools", "not supported"),
    (CHAT_PATH, {"response_format": {"type": "text"}}, "response_format", "not supported"),
    (CHAT_PATH, {"store": False}, "store", "not supported"),
    (TEXT_PATH, {"echo": True}, "echo", "not supported"),
    (TEXT_PATH, {"best_of": 1}, "best_of", "not supported"),
    (CHAT_PATH, {"top_k": 4}, "top_k", "not supported"),
    (TEXT_PATH, {"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
    (CHAT_PATH, {"frequency_penalty": -1}, "frequency_penalty", "greater than or equal to 0"),
    (CHAT_PATH, {"messages": []}, "messages", "at least 1 item"),
    (CHAT_PATH, {"messages": None}, "messages", "Field required"),
    (CHAT_PATH, {"messages": "hi"}, "messages", "valid list, got 'hi'"),
    (CHAT_PATH, {"messages": [{"content": "hi"}]}, "messages[0].role", "required"),
    (CHAT_PATH, {"messages": [MESSAGE, {"role": "user"}]}, "messages[1].content", "required"),
    (CHAT_PATH, {"messages": [MESSAGE | {"role": "tool"}]}, "messages[0].role", "'system', 'user'"),
    (CHAT_PATH, {"messages": [MESSAGE | {"name": "x"}]}, "messages[0].name", "not supported"),
    (CHAT_PATH, {"messages": [MESSAGE | {"content": 5}]}, "messages[0].content", "got 5"),
    (CHAT_PATH, {"messages": [MESSAGE | {"content": []}]}, "messages[0].content", "at least 1"),
    (
        CHAT_PATH,
        {"messages": [MESSAGE | {"content": [IMAGE]}]},
        "messages[0].content[0].image_url",
        "not supported here; the fields are type, text",
    ),
    (CHAT_PATH, {"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", "one of them"),
    (CHAT_PATH, {"max_completion_tokens": MOST + 1}, "max_tokens", f"most {MOST} here, got 65"),
    (TEXT_PATH, {"prompt": ""}, "prompt", "at least 1 character, got ''"),
    (TEXT_PATH, {"prompt": ["a", "b"]}, "prompt", "valid string, got ['a', 'b']"),
    (TEXT_PATH, {"prompt": "word " * 2000}, "prompt", "window of 1024"),
    (TEXT_PATH, {"prompt": "a" * 13313}, "prompt", "13313 characters of the prompt are more than"),
    (TEXT_PATH, {"prompt": "a" * 13312}, "prompt", "tokens of the prompt and 2 to generate are"),
    (
        CHAT_PATH,
        {"messages": [MESSAGE | {"content": "a" * 7000}] * 2},
        "messages",
        "14025 characters of the messages are more than the model's window of 1024 tokens",
    ),
    (TEXT_PATH, {"prompt": "a b" * 505, "max_tokens": 30}, "prompt", "window of 1024"),
    (TEXT_PATH, {"max_tokens": -1}, "max_tokens", "greater than or equal to 1, got -1"),
    (TEXT_PATH, {"max_tokens": 10**9}, "max_tokens", f"at most {MOST}"),
    (TEXT_PATH, {"max_tokens": 4.0}, "max_tokens", "valid integer, got 4.0"),
    (TEXT_PATH, {"max_tokens": True}, "max_tokens", "valid integer, got True"),
    (TEXT_PATH, {"temperature": "0"}, "temperature", "valid number, got '0'"),
    (TEXT_PATH, {"temperature": 2.1}, "temperature", "less than or equal to 2, got 2.1"),
    (TEXT_PATH, {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    (TEXT_PATH, {"top_p": 1.5}, "top_p", "less than or equal to 1"),
    (TEXT_PATH, {"seed": 2**63}, "seed", "less than"),
    (TEXT_PATH, {"stop": ""}, "stop[0]", "at least 1 character"),
    (TEXT_PATH, {"stop": ["a"] * 5}, "stop", "at most 4 items"),
    (TEXT_PATH, {"stop": "a" * 1001}, "stop[0]", "at most 1000 characters"),
    (TEXT_PATH, {"stream": "yes"}, "stream", "valid boolean"),
    (TEXT_PATH, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    (
        TEXT_PATH,
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        "stream_options.include_obfuscation",
        "not supported here; the fields are include_usage",
    ),
    (TEXT_PATH, {"model": None}, "model", "required"),
    (TEXT_PATH, {"model": 4}, "model", "valid string"),
]


def refused(answer: Any, status: int, words: str) -> dict[str, Any]:
    """The error of an answer, in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    return error


@pytest.mark.parametrize(("path", "change", "param", "words"), WRONG, ids=lambda x: f"{x!s:.40}")
def test_bad_fields(
    server: Here, path: str, change: dict[str, Any], param: str | None, words: str
) -> None:
    valid = {"model": "demo:p1", "max_tokens": 2}
    valid |= {"messages": [MESSAGE]} if path == CHAT_PATH else {"prompt": "a"}
    if "max_completion_tokens" in change:
        valid.pop("max_tokens")
    assert server.raw.post(path, json=valid | {"user": "me", "stop": None}).status_code == 200
    error = refused(server.raw.post(path, json=valid | change), 400, words)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_model_that_is_not_served(server: Here) -> None:
    for name in ("demo:p3", "demo", "demo:control", "/etc/passwd", "Qwen/Qwen2.5-3B"):
        with pytest.raises(openai.NotFoundError, match="served are demo:p1, demo:p2, demo:p4"):
            complete(server, model=name)
    with pytest.raises(openai.NotFoundError, match="no model 'demo:p3' here"):
        server.client.models.retrieve("demo:p3")


def test_bad_bodies(server: Here) -> None:
    json_type = {"Content-Type": "application/json"}
    for body, status, words in (
        (b"", 400, "The body"),
        (b'{"model": ', 400, "The body must be JSON"),
        (b"[]", 400, "The body: Input should be a valid dictionary"),
        (b"null", 400, "The body"),
        (b"[" * 200_000, 400, "body"),
        (b'{"model": "\xff"}', 400, "body"),
        (b'{"model": "demo:p1", "prompt": "\\ud800"}', 400, "prompt: Input should be a valid"),
        (b'{"model": "demo:p1", "prompt": "a", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "demo:p1", "prompt": "a", "top_p": 1e999}', 400, "top_p"),
        (b'{"model": "demo:p1", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b" " * (2**20 + 1), 413, "at most 1,048,576 bytes"),
        (iter([b" " * 2**19] * 3), 413, "at most 1,048,576 bytes"),  # of unknown length
    ):
        refused(server.raw.post(TEXT_PATH, content=body, headers=json_type), status, words)
    refused(server.raw.post(TEXT_PATH, content=b"{}"), 415, "must be application/json, got ''")
    form = server.raw.post(TEXT_PATH, data={"model": "demo:p1"})
    refused(form, 415, "got 'application/x-www-form-urlencoded'")
    for kind in ("Application/JSON", "application/json; charset=utf-8"):
        answer = server.raw.post(TEXT_PATH, content=b"{}", headers={"Content-Type": kind})
        refused(answer, 400, "model: Field required")
    for name, param in ((r"\ud800", r"\ud800"), ("é", r"\xe9"), ("x" * 5000, "x" * 100)):
        body = f'{{"{name}": 1}}'.encode()
        answer = server.raw.post(TEXT_PATH, content=body, headers=json_type)
        error = refused(answer, 400, f"{param}: not supported here; the fields are model")
        assert error["param"] == param
    big = {"model": "demo:p1", "prompt": "a", "stop": "\x00" * 900}
    assert server.raw.post(TEXT_PATH, json=big | {"max_tokens": 1}).status_code == 200


def posted(body: str, length: int | None = None) -> bytes:
    """What a client sends, or its beginning."""
    head = f"POST {TEXT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n{body}".encode()


def connect(url: str) -> socket.socket:
    return socket.create_connection((HOST, int(url.rpartition(":")[2])), timeout=10)


@pytest.mark.usefixtures("slow")
def test_a_slow_body(server: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    with connect(server.url) as half, ThreadPoolExecutor(1) as threads:
        half.sendall(posted("{", 10**6))
        answer = threads.submit(lambda: b"".join(iter(lambda: half.recv(4096), b"")))
        started = time.monotonic()
        while not answer.done() and time.monotonic() < started + 5:
            with suppress(OSError):  # closed, after the answer
                half.sendall(b" ")  # a byte in time gives no more of it
            time.sleep(0.1)
        head, _, body = answer.result().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["message"] == "The body must have come after 0.5 seconds."
    assert complete(server).usage.completion_tokens == 12  # of an answer of 1.2 s


def test_too_many_connections(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONNECTIONS", 4)
    with here(model) as server:
        others = [connect(server.url) for _ in range(3)]
        until(lambda: server.raw.get("/health").status_code == 503)
        others.pop().close()
        until(lambda: server.raw.get("/health").status_code == 200)
        for other in others:
            other.close()


def test_wrong_routes(server: Here) -> None:
    for path in ("/", "/v1", "/v1/models/", "/v1/embeddings", "/docs", "/openapi.json"):
        refused(server.raw.get(path), 404, f"GET {path}: Not Found")
    refused(server.raw.post("/v1/responses", json={}), 404, "POST /v1/responses: Not Found")
    wrong = server.raw.get(TEXT_PATH)
    refused(wrong, 405, f"GET {TEXT_PATH}: Method Not Allowed")
    assert wrong.headers["allow"] == "POST"
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asked = server.raw.options(TEXT_PATH, headers=preflight)
    refused(asked, 405, "Method Not Allowed")
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_other_names_of_this_machine_are_refused(server: Here) -> None:
    for host in ("localhost", "LocalHost:99", "127.0.0.1", "[::1]:8000"):
        assert server.raw.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.nip.io", "10.0.0.1", ""):
        answer = server.raw.get("/v1/models", headers={"Host": host})
        refused(answer, 403, f"must be one of 127.0.0.1, localhost, ::1, got {host!r}")


def test_without_a_chat_template(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with here(model, tokenizer=tokenizer) as server:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.client.chat.completions.create(model="demo:p1", messages=CHAT)
        assert complete(server).choices[0].text


def test_messages_that_the_template_refuses(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with (
        here(model, tokenizer=tokenizer) as server,
        pytest.raises(openai.BadRequestError, match=r"does not take .*: roles must alternate"),
    ):
        server.client.chat.completions.create(model="demo:p1", messages=CHAT)


def test_a_key(model: Any) -> None:
    with here(model, key="sécret") as server:
        assert idle(server)
        for key in ("none", "sécre", "sécretx"):
            header = {"Authorization": f"Bearer {key}".encode()}
            answer = server.raw.get("/v1/models", headers=header)
            error = refused(answer, 401, "Authorization: Bearer KEY")
            assert error["code"] == "invalid_api_key"
        refused(server.raw.post(TEXT_PATH, content=b"{"), 401, "API key")
        header = {"Authorization": "Bearer sécret".encode()}
        assert server.raw.get("/v1/models", headers=header).status_code == 200
    with here(model, key="secret") as server, client(server.url, "secret") as keyed:
        assert len(keyed.models.list().data) == 3
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()


# ---- the queue


def test_nothing_follows_an_end() -> None:
    async def late_piece() -> list[str | End]:
        job = Job()
        for event in ("a", End("stop", 1), "b"):
            job.put(event)
        assert job.ended
        return [event async for event in job.events()]

    assert asyncio.run(late_piece()) == ["a", End("stop", 1)]


@pytest.mark.usefixtures("slow")
def test_the_queue(model: Any) -> None:
    with here(model, places=2) as server, ThreadPoolExecutor(4) as threads:
        started = time.monotonic()
        first = threads.submit(complete, server, max_tokens=30)
        until(lambda: server.worker.running is not None)
        others = [threads.submit(complete, server, model=f"demo:p{p}") for p in (1, 2)]
        until(lambda: len(server.worker.waiting) == 2)
        asked = time.monotonic()
        state = server.raw.get("/health").json()
        assert state == {"status": "ok", "running": True, "waiting": 2}
        with pytest.raises(openai.RateLimitError, match="2 requests wait already") as full:
            complete(server)
        assert full.value.body["type"] == "rate_limit_error"
        assert time.monotonic() - asked < 2  # the first takes 3 s
        assert first.result().usage.completion_tokens == 30
        assert time.monotonic() - started > 3
        texts = [other.result().choices[0].text for other in others]
        assert texts == [alone(model, p, PROMPT, 12) for p in (1, 2)]
        until(lambda: idle(server))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(server: Here, stream: bool) -> None:
    body = json.dumps({"model": "demo:p1", "prompt": "a", "stream": stream, "max_tokens": MOST})
    request = posted(body)
    running, waiting, last = (connect(server.url) for _ in range(3))
    with running, waiting, last:
        running.sendall(request)
        until(lambda: server.worker.running is not None)
        waiting.sendall(request)
        until(lambda: len(server.worker.waiting) == 1)
        first = server.worker.running
        last.sendall(request)
        until(lambda: len(server.worker.waiting) == 2)
        waiting.close()  # leaves the queue, while the first runs on
        until(lambda: len(server.worker.waiting) == 1, 3)
        assert server.worker.running is first
        running.close()  # ends at the next token; whole answers take 6.4 s
        until(lambda: server.worker.running not in (first, None), 3)
    until(lambda: idle(server), 3)


def test_the_tokenizer_is_within_the_places(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken, go_on = Orders.take, [], threading.Event()

    def held(self: Orders, request: Any) -> Any:
        taken.append(request.prompt)
        assert go_on.wait(10)
        return take(self, request)

    monkeypatch.setattr(Orders, "take", held)
    with here(model, places=2) as server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(complete, server, prompt="first")
        until(lambda: taken)
        with connect(server.url) as second:
            second.sendall(posted(json.dumps({"model": "demo:p1", "prompt": "second"})))
            until(lambda: server.raw.get("/health").json()["waiting"] == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
                complete(server, prompt="third")
        until(lambda: any(job.ended for job in server.worker.entering))
        go_on.set()
        assert first.result().usage.completion_tokens == 12
        until(lambda: idle(server))
        assert taken == ["first"]  # the second left before its turn
        with pytest.raises(openai.NotFoundError):
            complete(server, model="x")
        assert idle(server)  # a refused request keeps no place


def test_a_stop_ends_what_is_tokenized(model: Any) -> None:
    worker = Worker(model, tiny_tokenizer(), 1)

    async def events() -> None:
        with worker.place() as job:
            worker.stop()
            worker.submit(job)
        assert not worker.waiting
        await anext(job.events())

    with pytest.raises(RequestError, match="The server is stopping"):
        asyncio.run(events())


def test_each_p_is_compiled_ahead(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generate, calls = type(model).generate, []

    def recorded(self: Any, **options: Any) -> Any:
        rows = generate(self, **options)
        calls.append((get_p(self), options["max_new_tokens"], rows.shape[1]))
        if get_p(self) == 4:
            raise RuntimeError("out of luck")
        return rows

    monkeypatch.setattr(type(model), "generate", recorded)
    for compiles, expected in ((False, []), (None, [(1, MOST, 2), (2, MOST, 2), (4, MOST, 2)])):
        monkeypatch.setattr(model, "compiles", compiles)
        worker = Worker(model, tiny_tokenizer(), 1, [1, 2, 4], MOST)
        until(lambda: len(calls) == len(expected))  # noqa: B023
        time.sleep(0.1)
        assert worker.thread.is_alive()  # an error is for each request to have
        worker.stop()
        worker.thread.join(5)
        assert calls == expected
    assert "Compiling ahead failed." in caplog.text


def test_an_error_while_generating(
    server: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = Reader._read

    def broken(self: Reader, ids: list[int]) -> None:
        if len(ids) == 3:
            raise RuntimeError("out of luck")
        read(self, ids)

    expected = complete(server).choices[0].text
    monkeypatch.setattr(Reader, "_read", broken)
    with pytest.raises(openai.InternalServerError, match="the server's log says why") as failed:
        complete(server)
    assert failed.value.body["type"] == "server_error"
    assert "out of luck" not in str(failed.value)
    assert "RuntimeError: out of luck" in caplog.text
    with pytest.raises(openai.APIError, match="Generation failed"):
        list(complete(server, stream=True))
    ask = {"model": "demo:p1", "messages": CHAT, "stream": True}
    *_, error, done, _ = server.raw.post(CHAT_PATH, json=ask).text.split("\n\n")
    body = json.loads(error.removeprefix("data: "))
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert done == "data: [DONE]"
    monkeypatch.setattr(Reader, "_read", read)
    assert complete(server).choices[0].text == expected


def test_a_bug_in_a_route(
    server: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Orders, "p_of", lambda *_: 1 / 0)
    caplog.set_level(logging.CRITICAL)
    refused(server.raw.get("/v1/models/demo:p1"), 500, "The server failed; its log says why.")


@pytest.mark.usefixtures("slow")
def test_a_stop_ends_what_runs_and_waits(model: Any) -> None:
    server = Here(model)
    ask = {"model": "demo:p1", "prompt": "a", "max_tokens": MOST, "stream": True}
    with ThreadPoolExecutor(3) as threads:
        stream = threads.submit(server.raw.post, TEXT_PATH, json=ask)
        until(lambda: server.worker.running is not None)
        plain = threads.submit(server.raw.post, TEXT_PATH, json=ask | {"stream": False})
        until(lambda: len(server.worker.waiting) == 1)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 3  # a whole answer takes 6.4 s
        *_, error, done, _ = stream.result().text.split("\n\n")
        assert "The server is stopping." in error
        assert done == "data: [DONE]"
        refused(plain.result(), 503, "The server is stopping.")


# ---- the command


def test_what_is_told_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_tokenizer", lambda *_: pytest.fail("too late"))
    monkeypatch.delenv(serving.KEY, raising=False)
    for host in ("0.0.0.0", "::", "10.1.2.3"):
        with pytest.raises(ServeError, match=f"takes an API key in the .* {serving.KEY}"):
            serve(str(run), host, 8000, 8)
    with listen(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port}: Address already in use. Name a free"):
            serve(str(run), HOST, port, 8)
    monkeypatch.setenv(serving.KEY, "k")
    with pytest.raises(ServeError, match="cannot listen at 203"):
        serve(str(run), "203.0.113.1", 0, 8)
    with pytest.raises(ServeError, match="cannot listen at no-such-host"):
        serve(str(run), "no-such-host.invalid", 0, 8)


def test_refused_by_the_command(run: Path, tmp_path: Path) -> None:
    assert_refused(recycle("serve", tmp_path, cwd=tmp_path), "family.json")
    script = (
        "import sys; sys.modules |= dict.fromkeys(['fastapi', 'uvicorn']); "
        f"sys.argv = ['recycle', 'serve', {str(run)!r}]; from recycle.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert_refused(done, "pip install 'recycle-lm[serve]'")


@contextmanager
def served(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, env=environment(), stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving demo:p1, demo:p2, demo:p4 at http://127.0.0.1:"), line
        yield process, line.split(" at ")[1].removesuffix("/v1. Ctrl-C stops it.\n")
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Send a signal; the rest of what the command prints."""
    started = time.monotonic()
    process.send_signal(number)
    printed = process.communicate(timeout=20)
    assert time.monotonic() - started < 10  # a busy machine included
    assert process.returncode == 0
    return printed


def test_what_is_cut_off_at_the_end(run: Path) -> None:
    with served(command("serve", run, "--port", 0, "--max-new-tokens", 1000)) as (process, url):
        ask = {"model": "demo:p4", "prompt": "a", "max_tokens": 1000}
        with (
            connect(url) as half,  # the body never comes
            httpx2.stream("POST", f"{url}{TEXT_PATH}", json=ask | {"stream": True}) as running,
        ):
            half.sendall(posted("{", 100))
            lines = running.iter_lines()
            next(lines)
            assert ended(process, signal.SIGTERM) == ("", "")
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_ctrl_c_in_a_forward_pass_that_hangs(run: Path) -> None:
    script = (
        "import sys, time; from recycle.serve.worker import Worker; "
        "Worker._generate = lambda *_: time.sleep(60); "
        f"sys.argv = ['recycle', 'serve', {str(run)!r}, '--port', '0']; "
        "from recycle.cli import main; main()"
    )
    with served([sys.executable, "-c", script]) as (process, url), ThreadPoolExecutor(1) as threads:
        ask = {"model": "demo:p1", "prompt": "a"}
        answer = threads.submit(httpx2.post, f"{url}{TEXT_PATH}", json=ask, timeout=20)
        until(lambda: httpx2.get(f"{url}/health").json()["running"])
        assert "Traceback" not in "".join(ended(process, signal.SIGINT))
        refused(answer.result(), 503, "The server is stopping.")


# ---- many clients at once

SEEDED = [
    {"model": f"demo:p{p}", "prompt": prompt, "max_tokens": 5 + p} | sampling
    for p in (1, 2, 4)
    for prompt in (PROMPT, "class Reader" * 60, "the quick" * 60)
    for sampling in ({"temperature": 0}, {"seed": p}, {"seed": 9, "top_p": 0.7})
]


def one_client(url: str, seconds: float, seed: int, expected: list[str]) -> int:
    """Ask in every way for some seconds; how many answers were right. All of them must be."""
    rng, right, deadline = random.Random(seed), 0, time.monotonic() + seconds
    with client(url) as api, httpx2.Client(base_url=url, timeout=30) as raw:
        while time.monotonic() < deadline:
            way, number = rng.choice(["plain", "stream", "leave", "wrong"]), rng.randrange(27)
            ask: Any = SEEDED[number]
            if way == "plain":
                assert api.completions.create(**ask).choices[0].text == expected[number]
                right += 1
            elif way == "stream":
                chunks = api.completions.create(stream=True, **ask)
                assert streamed(chunks)[0] == expected[number]
                right += 1
            elif way == "leave":
                with api.completions.create(stream=True, **ask) as chunks:
                    next(iter(chunks))
                with pytest.raises(httpx2.TimeoutException):
                    raw.post(TEXT_PATH, json=ask | {"max_tokens": 64}, timeout=0.01)
            else:
                change = rng.choice([{"n": 2}, {"model": "x"}, {"temperature": "hot"}])
                assert raw.post(TEXT_PATH, json=ask | change).status_code in (400, 404)
    return right


@pytest.mark.slow
def test_many_clients(run: Path) -> None:
    with served(command("serve", run, "--port", 0)) as (process, url):
        with client(url) as api:
            expected = [api.completions.create(**ask).choices[0].text for ask in SEEDED]
        assert len(set(expected)) > 20
        memory, own = [], psutil.Process(process.pid)
        for _ in range(2):
            with ThreadPoolExecutor(16) as threads:
                asked = [threads.submit(one_client, url, 4, n, expected) for n in range(16)]
                assert sum(each.result() for each in asked) > 16
            until(lambda: httpx2.get(f"{url}/health").json()["waiting"] == 0)
            until(lambda: not httpx2.get(f"{url}/health").json()["running"])
            memory.append(own.memory_info().rss)
        # Measured: 0.1 MB. The caches of a round's hundred requests are over 20 MB.
        assert memory[1] - memory[0] < 8e6
        with client(url) as api:
            again = [api.completions.create(**ask).choices[0].text for ask in SEEDED]
        assert again == expected
        assert ended(process, signal.SIGTERM) == ("", "")
