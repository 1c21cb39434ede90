"""Server-sent events, and noticing that a client has gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

_LAST_WORDS_S = 1.0

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """JSON in as few bytes as it takes, as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One event: one line of JSON."""
    return b"data: " + encode(value) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client leaves first.

    raises  ClientDisconnect then, with the work cancelled
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come. When the client leaves, so does the work behind them.

    close     called when it is over, however it ends
    stall_s   seconds that a client may leave an event unread
    deadline  when it may leave none unread, by the event loop's clock; None: never
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        stall_s: float,
        deadline: float | None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._stall_s = stall_s
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; ends quietly where the client does.

        raises  TimeoutError where it is there and reads no more
        """
        try:
            with suppress(ClientDisconnect):
                await until_disconnect(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send_in_time(send, start)
        async for body in self._events:
            event = {"type": "http.response.body", "body": body, "more_body": True}
            await self._send_in_time(send, event)
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send_in_time(send, end)

    async def _send_in_time(self, send: Send, message: Message) -> None:
        """Send, while a client that does not read holds up the rest.

        That the time is over is itself an event, and has a moment to be sent.
        """
        limit_s = self._stall_s
        if self._deadline is not None:
            left_s = self._deadline - asyncio.get_running_loop().time()
            limit_s = min(limit_s, max(_LAST_WORDS_S, left_s))
        async with asyncio.timeout(limit_s):
            await send(message)
