"""Start and stop: the port, the key, the family, and what a signal ends."""

import logging
import os
import signal
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from recycle.decode.text import find_tokenizer, load_here
from recycle.disk import expand
from recycle.errors import RecycleError

from .app import create_app
from .gate import LOOPBACK
from .orders import Orders
from .worker import Worker

KEY = "RECYCLE_API_KEY"
PLACES = 64  # requests that may wait
CONNECTIONS = 256  # those included that send nothing
SECONDS = 1  # for the last answers at the end, and again for the last token


class ServeError(RecycleError):
    """The server cannot be started like this."""


class Server(uvicorn.Server):
    """Ends the worker's jobs when it is to stop, and so their connections.

    While there are too many connections uvicorn answers every request with a bare 503, `/health`
    included: a server that takes no requests is not to be sent any.
    """

    def __init__(self, app: FastAPI, worker: Worker) -> None:
        options: Any = {"http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio"}
        options |= {"log_level": "warning", "access_log": False, "proxy_headers": False}
        options["limit_concurrency"] = CONNECTIONS
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=SECONDS, **options))
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.stop()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of what is cut off now
        await super().shutdown(sockets)


def serve(
    source: str,
    host: str,
    port: int,
    max_new_tokens: int,
    backbone: str | None = None,
    compile: bool | None = None,
) -> None:
    """Serve each P of a family as a model, until a signal to stop.

    It speaks plain HTTP: on a network that others read, put something with TLS in front.

    Args:
        source: A run folder, an adapter folder or a Hub id.
        host: Where to listen. Any but this machine's own names needs a key in RECYCLE_API_KEY.
        port: 0 is any that is free.
        max_new_tokens: The most that a request may ask for, and what it gets by default.
        backbone: Where the backbone lies now, if not where the adapters recorded it.
        compile: See `recycle.load`. Requests wait until a step of each P is compiled, for a short
            prompt and `max_new_tokens`; the first of another length of cache waits for its own.

    Raises:
        ServeError: There is no key, or the port cannot be had.
        FamilyError, BackboneError: See `recycle.load`; or there is no tokenizer.
    """
    key = os.environ.get(KEY)
    if host not in LOOPBACK and not key:
        raise ServeError(
            f"--host {host} opens the server to other machines, which takes an API key in the "
            f"environment variable {KEY}, and there is none. Set it, or leave out --host."
        )
    listener = listen(host, port)
    tokenizer = find_tokenizer(source, backbone)
    model = load_here(source, None, backbone, compile)
    orders = Orders(expand(source).resolve().name, model, tokenizer, max_new_tokens)
    longest = max_new_tokens if orders.window is None else min(max_new_tokens, orders.window - 1)
    worker = Worker(model, tokenizer, PLACES, list(orders.models.values()), longest)
    server = Server(create_app(orders, worker, key or None, host in LOOPBACK), worker)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn stops, then raises them again
        signal.signal(number, lambda *_: None)
    where = f"[{host}]" if ":" in host else host
    url = f"http://{where}:{listener.getsockname()[1]}/v1"
    print(f"Serving {', '.join(orders.models)} at {url}. Ctrl-C stops it.", flush=True)
    server.run([listener])
    worker.thread.join(SECONDS)
    if worker.thread.is_alive():  # in a long forward pass, which nothing interrupts
        sys.stdout.flush()
        os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """Take a port, before anything slow is done.

    Raises:
        ServeError: It is taken, or the host is no address of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServeError(
            f"The server cannot listen at {host}, port {port}: {error.strerror}. Name a free port "
            "with --port, and an address of this machine with --host."
        ) from None
    return listener
