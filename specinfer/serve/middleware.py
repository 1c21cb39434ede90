"""What surrounds every request: its id, its key, the size of its body, and a line in the log.

Plain ASGI, so that a stream passes through untouched.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specinfer.serve.errors import ApiError, as_api_error
from specinfer.serve.settings import ServerSettings
from specinfer.serve.sse import encode
from specinfer.serve.state import Service

OPEN_PATHS = ("/health", "/")
"""What is there without a key; so are the page's files. All else, metrics included, wants one."""

_log = logging.getLogger("specinfer.serve")


class Surroundings:
    """Gives every request an id, checks key and size, and logs how it went."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._settings = service.settings
        self._metrics = service.metrics
        self._keys = [key.encode() for key in service.settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(Headers(scope=scope))
        state["note"] = note
        state["arrival_s"] = start = time.perf_counter()
        status = 0
        body = _LimitedBody(receive, self._settings)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def send_unless_refused(message: Message) -> None:
            if body.refusal is None:  # else: what was made of the part of it that was read
                await send_with_id(message)

        try:
            self._check(scope)
            await self._app(scope, body.receive, send_unless_refused)
            if body.refusal is not None and status == 0:
                raise body.refusal
        except ClientDisconnect:
            pass  # nobody is there to be told
        except Exception as error:
            refusal = as_api_error(error)
            if refusal.status == 500:
                _log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status == 0:
                await _send_error(refusal, send_with_id)
            else:
                note.setdefault("error", repr(error))
        finally:
            status = status or 499  # as nginx has it: the client left before an answer
            route = scope.get("route")
            self._metrics.count_response(getattr(route, "path", "other"), status)
            told = {"method": scope["method"], "path": scope["path"], "status": status}
            duration_s = round(time.perf_counter() - start, 4)
            fields = {"request_id": request_id} | told | {"duration_s": duration_s} | note
            _log.info("request", extra={"fields": fields})

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/")
        if self._keys and not is_open and not _has_key(headers, self._keys):
            raise ApiError(
                401,
                "this server wants an API key: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length, limit = headers.get("content-length", ""), self._settings.max_body_bytes
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)


class _LimitedBody:
    """A body that may be sent without saying how long it is, and piece by piece.

    refusal  why no more of it is read; None: it is
    """

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self.refusal: ApiError | None = None
        self._receive = receive
        self._settings = settings
        self._deadline: float | None = asyncio.get_running_loop().time() + settings.body_timeout_s
        self._num_bytes = 0

    async def receive(self) -> Message:
        """The next message.

        raises  ApiError once it is too large, or takes too long
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _too_slow(self._settings.body_timeout_s)
            raise self.refusal from None
        if not message.get("more_body"):  # what comes behind it is that the client leaves
            self._deadline = None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._settings.max_body_bytes:
            self.refusal = _too_large(self._settings.max_body_bytes)
            raise self.refusal
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes (max_body_bytes)",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _too_slow(limit_s: float) -> ApiError:
    return ApiError(
        408,
        f"the body took longer than {limit_s:g} s to arrive (body_timeout_s)",
        code="timeout",
        headers={"Connection": "close"},
    )


def _request_id(headers: Headers) -> str:
    """The client's own, where it can stand in a header and a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:+/=@-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


def _has_key(headers: Headers, keys: Sequence[bytes]) -> bool:
    """Compared in constant time, with every key: how long it takes tells nothing."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    key = given.strip().encode() if scheme.lower() == "bearer" else b""
    return any([hmac.compare_digest(key, each) for each in keys])  # noqa: C419 - all of them


async def _send_error(error: ApiError, send: Send) -> None:
    body = encode(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    raw = [(k.lower().encode(), v.encode()) for k, v in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
