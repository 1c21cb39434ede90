"""What the tests of the server share: an app behind a real socket, on the pair or on a script."""

import asyncio
import copy
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from specinfer.async_llm import AsyncLLM, StepUpdate
from specinfer.engine.scheduler import Job
from specinfer.outputs import CompletionOutput, RequestOutput, RequestStats
from specinfer.request import SamplingParams
from specinfer.serve.app import make_app
from specinfer.serve.settings import ServerSettings
from specinfer.serve.state import Service

MODEL = "zoo:parley"
DRAFTER = "zoo:parley-draft"


def pair(**options: Any) -> AsyncLLM:
    """The bundled pair in float32, where greedy text does not depend on the batch."""
    return AsyncLLM(
        MODEL, **{"drafters": [DRAFTER], "dtype": "float32", "max_model_len": 256} | options
    )


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve on a free port of this machine; gives the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(service), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
"""Making one takes longer than most requests do; it holds nothing between them."""


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    """One request, not kept alive."""
    return CLIENT.post(url + path, json=body, **options)


def until(condition: Any) -> None:
    """Wait until something holds, for a minute: a busy machine may take long over anything."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


class Held:
    """Notes whom each step computes, and holds one step up, after it was scheduled.

    steps      per step: the ids of its requests
    at         the step to hold: the first for which this is true of `steps`
    under_way  set while that step is held; `go_on` lets it go
    """

    def __init__(
        self,
        llm: AsyncLLM,
        monkeypatch: pytest.MonkeyPatch,
        at: Callable[[list[set[str]]], bool],
    ) -> None:
        self.steps: list[set[str]] = []
        self.under_way, self.go_on = threading.Event(), threading.Event()
        self._at = at
        self._schedule = llm.llm.engine.scheduler.schedule
        monkeypatch.setattr(llm.llm.engine.scheduler, "schedule", self._hold)

    def _hold(self) -> list[Job]:
        jobs = self._schedule()
        self.steps.append({job.sequence.request_id for job in jobs})
        if not self.under_way.is_set() and self._at(self.steps):
            self.under_way.set()
            assert self.go_on.wait(60)
        return jobs


class Scripted:
    """An `AsyncLLM` whose model says what the test says, piece by piece.

    pieces    of every continuation's text
    logprobs  one entry per piece, where they are asked for
    """

    def __init__(self, llm: AsyncLLM, template: str | None = None) -> None:
        self.llm = llm.llm
        self.tokenizer = copy.copy(llm.tokenizer)
        self.tokenizer._compiled = {}
        if template is not None:
            self.tokenizer.chat_templates = {"default": template}
        self.pieces: Sequence[str] = ("Hello", " there")
        self.logprobs: Sequence[Any] | None = None
        self.prompt_logprobs: Sequence[Any] | None = None
        self.finish_reason = "stop"
        self.asked: list[tuple[Sequence[int], SamplingParams]] = []
        self.is_alive = True

    @property
    def prompt(self) -> str:
        """The text of the last prompt."""
        return self.tokenizer.decode(self.asked[-1][0], skip_special_tokens=False)

    async def prepare(self, params: SamplingParams) -> None:
        self.prepared = params.structure

    def submit(self, prompts: Sequence[tuple[Any, SamplingParams]], request_id: str) -> Any:
        self.asked += prompts
        updates = [
            self._update(index, *prompts[index], count)
            for count in range(1, len(self.pieces) + 1)
            for index in range(len(prompts))
        ]
        return _Stream(updates)

    def _update(
        self, index: int, prompt: Sequence[int], params: SamplingParams, count: int
    ) -> StepUpdate:
        is_last = count == len(self.pieces)
        outputs = []
        for sample in range(params.n):
            output = CompletionOutput(
                sample, "".join(self.pieces[:count]), list(range(5, 5 + count))
            )
            output.logprobs = None if self.logprobs is None else list(self.logprobs[:count])
            if is_last:
                output.finish_reason = self.finish_reason
            outputs.append(output)
        stats = RequestStats(num_output_tokens=count * params.n, num_target_steps=count)
        whole = RequestOutput("r", None, list(prompt), outputs, is_last, stats)
        whole.prompt_logprobs = self.prompt_logprobs
        return StepUpdate(index, whole, time.perf_counter(), time.perf_counter())


class _Stream:
    def __init__(self, updates: Sequence[StepUpdate]) -> None:
        self._updates = iter(updates)

    async def accepted(self) -> None:
        await asyncio.sleep(0)

    async def __anext__(self) -> StepUpdate:
        await asyncio.sleep(0)
        try:
            return next(self._updates)
        except StopIteration:
            raise StopAsyncIteration from None

    def close(self) -> None:
        self._updates = iter(())


def entry(logprob: float, rank: int, text: str) -> Any:
    """A token's log-probability, as the engine gives it."""
    return SimpleNamespace(logprob=logprob, rank=rank, decoded_token=text)


def service_of(llm: Any, **settings: Any) -> Service:
    """A service of the pair's name."""
    return Service(llm, ServerSettings(**settings), MODEL)
