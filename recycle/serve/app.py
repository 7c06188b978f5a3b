"""The routes, and errors in one form."""

import asyncio
import time

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from .answers import Answer, dump
from .gate import JSON, Gate, respond
from .job import Job
from .orders import Orders
from .requests import ChatRequest, CompletionRequest, RequestError, problem
from .worker import Worker


def create_app(orders: Orders, worker: Worker, key: str | None, loopback: bool) -> FastAPI:
    """The application; see `Gate` for `key` and `loopback`."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(Gate, key=key, loopback=loopback)
    started, one_at_a_time = int(time.time()), asyncio.Lock()
    watchers = set[asyncio.Task[None]]()  # the event loop keeps no task alive by itself

    def model_card(name: str) -> Model:
        return Model(id=name, created=started, object="model", owned_by="recycle")

    async def watch(request: Request, job: Job) -> None:
        """Cancel a job whose client goes away; ends with the answer at the latest."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        worker.cancel(job)

    async def answer(asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        with worker.place() as job:
            watchers.add(watcher := asyncio.create_task(watch(request, job)))
            watcher.add_done_callback(watchers.discard)
            async with one_at_a_time:
                if not job.ended:  # in a thread, since a long text takes the tokenizer a while
                    job.order = await to_thread.run_sync(orders.take, asked)
                    worker.submit(job)
        form = Answer(asked.model, job, isinstance(asked, ChatRequest))
        if not asked.stream:
            return Response(await form.whole(), media_type=JSON)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(form.stream(with_usage), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, str | int | bool]:
        running = worker.running is not None
        return {"status": "ok", "running": running, "waiting": worker.taken}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        cards = [model_card(name).to_dict() for name in orders.models]
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        orders.p_of(name)
        return Response(dump(model_card(name)), media_type=JSON)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await answer(asked, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await answer(asked, request)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return respond(problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}: " if error.status_code in (404, 405) else ""
        return respond(RequestError(error.status_code, f"{where}{error.detail}"), error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return respond(RequestError(500, "The server failed; its log says why."))

    return app
