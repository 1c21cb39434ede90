"""One streamed request to an OpenAI server, and the times at which its text came.

Inter-token latency is the time between two chunks with text, as `vllm bench serve` counts it. A
speculative server sends several tokens in a chunk, so the gaps are then longer than the time per
output token (which divides by tokens): one is what a reader sees, the other is speed.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from specinfer.errors import ConfigError
from specinfer.loadtest.plan import Endpoint
from specinfer.loadtest.prompts import Prompt

_PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_CONNECT_S = 30.0
_SHORT = 160


@dataclass(slots=True)
class Record:
    """What became of one request; times are seconds of `time.perf_counter`.

    first_s        when its first text came
    last_s         when its last chunk came
    last_text_s    when its last text came
    gaps_s         between chunks with text
    output_tokens  as the server counts them; where it does not (has_usage), chunks with text
    error          why it failed; None: it did not
    """

    start_s: float
    first_s: float | None = None
    last_text_s: float = 0.0
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_chunks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token; of an answer without text, to its end."""
        return (self.last_s if self.first_s is None else self.first_s) - self.start_s

    @property
    def e2el_s(self) -> float:
        """Time to the last token."""
        return self.last_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is none."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)


class StreamError(Exception):
    """A stream that says it failed, or ends before its end."""


def open_client(base_url: str, api_key: str | None, timeout_s: float | None) -> httpx.AsyncClient:
    """A client for any number of requests at a time.

    base_url   with or without the /v1 that OpenAI's own clients want
    timeout_s  without a word from the server; None: for ever
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def first_model(client: httpx.AsyncClient) -> str:
    """What the server calls its model.

    raises  ConfigError where there is no server, or it does not say
    """
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        url = client.base_url.join("/v1/models")
        raise ConfigError(
            f"{url} does not name a model ({_short(str(error))}): check --base-url and --api-key, "
            "or give --model"
        ) from None


async def ask(
    client: httpx.AsyncClient, endpoint: Endpoint, fields: Mapping[str, Any], prompt: Prompt
) -> Record:
    """Send one request and read its answer to the end; what fails is told in the record.

    fields  of the body, the same for all requests
    """
    question: dict[str, Any] = (
        {"messages": list(prompt.messages)} if endpoint == "chat" else {"prompt": prompt.text}
    )
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    body = question | streaming | dict(fields) | dict(prompt.options)
    record = Record(time.perf_counter())
    try:
        async with client.stream("POST", _PATHS[endpoint], json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise StreamError(f"HTTP {response.status_code}: {_short(text)}")
            await _read(response, record)
    except StreamError as error:
        record.error = str(error)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        record.error = _short(f"{type(error).__name__}: {error}")
    return record


async def _read(response: httpx.Response, record: Record) -> None:
    has_ended = False
    async for now_s, data in _events(response):
        if data == "[DONE]":
            has_ended = True
            break
        chunk = json.loads(data)
        if chunk.get("error"):
            raise StreamError(_short(f"the stream says: {chunk['error']}"))
        usage = chunk.get("usage")
        if usage:
            record.has_usage = True
            record.prompt_tokens = usage.get("prompt_tokens") or 0
            record.output_tokens = usage.get("completion_tokens") or 0
        if not chunk.get("choices"):
            continue
        choice = chunk["choices"][0]
        has_ended = has_ended or choice.get("finish_reason") is not None
        if _has_text(choice):
            if record.first_s is None:
                record.first_s = now_s
            else:
                record.gaps_s.append(now_s - record.last_text_s)
            record.last_text_s = now_s
            record.num_chunks += 1
        record.last_s = now_s
    if not has_ended:
        raise StreamError("the stream broke off")
    if not record.last_s:
        raise StreamError("the stream had no choices")
    if not record.has_usage:
        record.output_tokens = record.num_chunks


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk brings part of the answer, and is not just the role or the end."""
    delta = choice.get("delta")
    return bool(choice.get("text")) if delta is None else any(delta.get(each) for each in _TEXTS)


async def _events(response: httpx.Response) -> AsyncIterator[tuple[float, str]]:
    """When each event came, and its data. Lines end at newlines alone: JSON may hold U+2028."""
    rest = b""
    async for part in response.aiter_bytes():
        now_s = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                yield now_s, value.strip().decode()


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"
