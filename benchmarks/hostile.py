"""What clients do to a server: ask and read, leave in the middle, send what is no request."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

Body = dict[str, Any]

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ASKED: Body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}

BROKEN: tuple[tuple[str, bytes | None], ...] = (
    ("nothing", b""),
    ("half of a JSON object", json.dumps(_ASKED).encode()[:40]),
    ("no UTF-8", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    ("a list", b"[1, 2, 3]"),
    ("no messages", b"{}"),
    ("messages as a text", b'{"messages": "Hello"}'),
    ("a temperature in words", json.dumps(_ASKED | {"temperature": "hot"}).encode()),
    ("fewer tokens than none", json.dumps(_ASKED | {"max_tokens": -1}).encode()),
    ("a field that is none", json.dumps(_ASKED | {"nonsense": 1}).encode()),
    ("another model", json.dumps(_ASKED | {"model": "nobody/nothing"}).encode()),
    (
        "more than the context holds",
        json.dumps({"messages": [{"role": "user", "content": "and so on " * 5000}]}).encode(),
    ),
    ("a body that breaks off", None),
)
"""Their names and bodies; None: fewer bytes come than were announced."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose answer is known.

    prompt         token ids, for `/v1/completions`; None: a chat
    text, finish_reason  what the offline run gave
    """

    messages: list[dict[str, str]]
    prompt: list[int] | None
    fields: Body
    is_stream: bool
    text: str
    finish_reason: str

    @property
    def path(self) -> str:
        """Where it goes."""
        return _CHAT if self.prompt is None else _COMPLETIONS

    def body(self, *, stream: bool) -> Body:
        """What is sent."""
        question: Body = (
            {"messages": self.messages} if self.prompt is None else {"prompt": self.prompt}
        )
        return question | self.fields | {"stream": stream}

    def describe(self) -> str:
        """Its fields and the beginning of its prompt."""
        return f"{self.fields} {self.messages[0]['content']!r:.60}"


@dataclass(slots=True)
class Answer:
    """What a client read."""

    text: str = ""
    finish_reason: str = ""
    error: str | None = None


async def ask(http: httpx.AsyncClient, job: Job) -> Answer:
    """Read an answer to its end."""
    answer = Answer()
    try:
        if not job.is_stream:
            response = await http.post(job.path, json=job.body(stream=False))
            if response.status_code != 200:
                answer.error = f"status {response.status_code}: {response.text[:200]}"
                return answer
            choice = response.json()["choices"][0]
            answer.text = choice["message"]["content"] if "message" in choice else choice["text"]
            answer.finish_reason = choice["finish_reason"]
            return answer
        async with http.stream("POST", job.path, json=job.body(stream=True)) as response:
            if response.status_code != 200:
                answer.error = f"status {response.status_code}: {(await response.aread())!r:.200}"
                return answer
            async for choice in _choices(response):
                delta = choice.get("delta")
                new = choice.get("text") if delta is None else delta.get("content")
                answer.text += new or ""
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if not answer.finish_reason:
            answer.error = "the stream broke off"
    except (httpx.HTTPError, ValueError, LookupError) as error:
        answer.error = repr(error)
    return answer


async def leave(http: httpx.AsyncClient, job: Job, num_chunks: int, patience_s: float) -> None:
    """Close the connection after so many chunks, or when patience is at its end."""
    with suppress(TimeoutError, httpx.HTTPError):
        async with (
            asyncio.timeout(patience_s),
            http.stream("POST", job.path, json=job.body(stream=True)) as response,
        ):
            left = num_chunks
            async for _ in response.aiter_bytes():
                left -= 1
                if left <= 0:
                    return


async def send_broken(http: httpx.AsyncClient, body: bytes) -> tuple[int, Any]:
    """Status and body of the answer to what is no request; 0 where there is none."""
    headers = {"content-type": "application/json"}
    try:
        response = await http.post(_CHAT, content=body, headers=headers)
        return response.status_code, response.json()
    except (httpx.HTTPError, ValueError) as error:
        return 0, repr(error)


async def tear(url: httpx.URL) -> None:
    """Announce a body, send the beginning of it and go."""
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    writer.write(f'{head}Content-Length: 1000\r\n\r\n{{"messages":'.encode())
    with suppress(OSError):
        await writer.drain()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _choices(response: httpx.Response) -> AsyncIterator[Body]:
    """Choices of a stream's chunks.

    raises  ValueError where a chunk tells of an error
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(f"the stream says {chunk['error']}")
                for choice in chunk["choices"]:
                    yield choice
