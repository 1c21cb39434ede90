"""A client that leaves: the step under way is its last, and every page is free afterwards."""

import asyncio
import json
import time
from typing import Any

import pytest

from specinfer.async_llm import AsyncLLM
from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams
from specinfer.serve.app import make_app
from tests.engines import free_blocks
from tests.serving import Held, service_of, until

LONG = {"max_tokens": 240, "temperature": 0, "ignore_eos": True}
STAYS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


class Client:
    """One POST, spoken to the application itself; gone once `leave` is set."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.leave = asyncio.Event()
        self.told: list[str] = []
        self._body = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"goes")],
        }

    async def receive(self) -> dict[str, Any]:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.told.append(message["type"])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "Once upon a time"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_the_step_under_way_is_the_last(
    parley: AsyncLLM, path: str, asked: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held within a step, the engine is let go once the server has seen that the client left."""
    engine, service = parley.llm.engine, service_of(parley)
    full = free_blocks(engine)
    held = Held(parley, monkeypatch, lambda steps: sum(map(has_left, steps)) == 3)
    client = Client(path, LONG | asked | {"stream": stream, "n": 3})

    async def stay() -> RequestOutput:
        outputs = [output async for output in parley.generate("The dog", STAYS, "stays")]
        return outputs[-1]

    async def run() -> RequestOutput:
        staying = asyncio.create_task(stay())
        asking = asyncio.create_task(make_app(service)(client.scope, client.receive, client.send))
        await asyncio.to_thread(held.under_way.wait, 60)
        client.leave.set()
        await asyncio.wait_for(asking, 60)
        held.go_on.set()
        return await staying

    assert len(asyncio.run(run()).outputs[0].token_ids) == 200, "the other one goes on"
    computed = [number for number, step in enumerate(held.steps) if has_left(step)]
    assert len(computed) == 3, "no step after the one that was under way computes it"
    assert len(held.steps) > computed[-1] + 3
    assert bool(client.told) == stream
    until(lambda: free_blocks(engine) == full and not engine.has_work)
    assert service.num_taken == 0


@pytest.mark.parametrize("limit", ["stall_timeout_s", "request_timeout_s"])
def test_a_client_that_reads_no_more_is_left(
    parley: AsyncLLM, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is late once it reads no more: until then a busy machine has all it needs."""
    service = service_of(parley, **{limit: 20.0})
    full = free_blocks(parley.llm.engine)
    client = Client("/v1/completions", LONG | {"prompt": "Once upon a time", "stream": True})

    async def send(message: Any) -> None:
        client.told.append(message["type"])
        if len(client.told) > 2:
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + 30.0)
            await asyncio.Event().wait()

    async def run() -> None:
        await asyncio.wait_for(make_app(service)(client.scope, client.receive, send), 60)

    asyncio.run(run())
    assert client.told == ["http.response.start", *["http.response.body"] * 2]
    assert service.num_taken == 0
    until(lambda: free_blocks(parley.llm.engine) == full)


def has_left(step: set[str]) -> bool:
    """Whether a step computed the request whose client left."""
    return bool(step - {"stays"})
