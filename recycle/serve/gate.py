"""Who may come in, and with how much."""

import asyncio
import hmac
import re
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import refusal
from .requests import RequestError

BODY_BYTES = 2**20
BODY_SECONDS = 30
JSON = "application/json"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)


def respond(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's form."""
    return Response(refusal(error), error.status, headers, JSON)


class Gate:
    """Refuses requests by their headers, before anything of them is read, and by size and time.

    A page in a browser can send requests to this machine. It cannot send JSON as such without
    asking first, which is never granted here, nor give its own name as ours (DNS rebinding).

    A body must have come after 30 seconds. The headers before it are uvicorn's, which waits for
    half a line as long as the connection lasts.

    Args:
        app: What lies behind.
        key: The API key, if one is needed; `/health` needs none.
        loopback: Whether only this machine can reach the server.
    """

    def __init__(self, app: ASGIApp, key: str | None, loopback: bool) -> None:
        self.app, self.loopback = app, loopback
        self.needed = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, deadline = 0, asyncio.get_running_loop().time() + BODY_SECONDS
        whole = False

        async def limited() -> Message:
            nonlocal size, whole
            try:
                async with asyncio.timeout_at(None if whole else deadline):
                    message = await receive()
            except TimeoutError:
                rule = f"The body must have come after {BODY_SECONDS} seconds."
                raise HTTPException(408, rule, {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > BODY_BYTES:
                raise HTTPException(413, f"The body must be at most {BODY_BYTES:,} bytes.")
            return message

        error = self._problem(scope) if scope["type"] == "http" else None
        await (self.app if error is None else respond(error))(scope, limited, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        host, kind = headers.get("host", ""), headers.get("content-type", "")
        if self.loopback and not LOOPBACK_NAMES.fullmatch(host):
            names = ", ".join(LOOPBACK)
            return RequestError(403, f"The Host header must be one of {names}, got {host!a:.100}.")
        given = headers.get("authorization", "").encode("latin-1")
        needed = b"" if scope["path"] == "/health" else self.needed
        if needed and not hmac.compare_digest(given, needed):
            rule = "An API key is needed, in the header: Authorization: Bearer KEY."
            return RequestError(401, rule, code="invalid_api_key")
        if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != JSON:
            rule = f"Content-Type must be {JSON}, got {kind!a:.100}."
            return RequestError(415, rule)
        return None
