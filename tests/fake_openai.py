"""A server that speaks OpenAI's stream with known delays, and fails where it is told to."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """How it answers, and what it was asked.

    chunks      pieces of text of each answer; tokens_per_chunk of tokens each
    first_s     before the first, gap_s between two
    together    each waits until so many were asked for at a time
    fails       by the number of the request, from 0: "503", "broken", "error" or "nothing"
    has_usage   whether it counts tokens
    most        requests at a time, the most there were
    """

    chunks: int = 5
    tokens_per_chunk: int = 1
    first_s: float = 0.0
    gap_s: float = 0.0
    together: int = 0
    fails: dict[int, str] = field(default_factory=dict)
    has_usage: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrive_s: list[float] = field(default_factory=list)
    most: int = 0
    _running: int = 0

    async def answer(self, request: Request) -> Response:
        self.arrive_s.append(time.perf_counter())
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.fails.get(number) == "503":
            return JSONResponse({"error": {"message": "too many requests"}}, 503)
        is_chat = request.url.path.endswith("chat/completions")
        events = self._events(is_chat, self.fails.get(number))
        return StreamingResponse(events, media_type="text/event-stream")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake"}]})

    async def _events(self, is_chat: bool, failure: str | None) -> AsyncIterator[str]:
        self._running += 1
        self.most = max(self.most, self._running)
        end = time.monotonic() + 60
        while self.most < self.together and time.monotonic() < end:
            await asyncio.sleep(0.005)
        if failure == "nothing":
            self._running -= 1
            yield "data: [DONE]\n\n"
            return
        if is_chat:  # at once: the role is not a token
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.first_s)
        for number in range(self.chunks):
            if number:
                await asyncio.sleep(self.gap_s)
            if failure == "error":
                yield _event({"error": {"message": "the engine failed"}})
                self._running -= 1
                return
            text = "a line\u2028with a strange end "
            yield _event({"choices": [{"delta": {"content": text}} if is_chat else {"text": text}]})
        if failure != "broken":
            end = {"finish_reason": "length"}
            yield _event({"choices": [{"delta": {}} | end if is_chat else {"text": ""} | end]})
            if self.has_usage:
                num = self.chunks * self.tokens_per_chunk
                usage = {"prompt_tokens": 7, "completion_tokens": num, "total_tokens": num + 7}
                yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        self._running -= 1


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@contextmanager
def fake_server(**how: Any) -> Iterator[tuple[str, FakeServer]]:
    """Run one on a free port; gives its URL and what it does."""
    fake = FakeServer(**how)
    app = Starlette(
        routes=[
            Route("/v1/models", fake.models),
            Route("/v1/chat/completions", fake.answer, methods=["POST"]),
            Route("/v1/completions", fake.answer, methods=["POST"]),
        ]
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", fake
        finally:
            server.should_exit = True
            thread.join()
