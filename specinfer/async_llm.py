"""The same engine behind asyncio: one thread steps, any number of coroutines wait.

    engine thread   takes commands, steps, and hands each request's output to its event loop
    coroutines      put commands in, read their own queue; leaving one aborts its request

Only the engine thread touches the engine.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from specinfer.errors import ConfigError, SpecInferError
from specinfer.llm import LLM, Pending, Prompt
from specinfer.request import RequestOutput, SamplingParams

Command = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Client:
    """Where a request's outputs go; `request` is set once the engine has taken it."""

    loop: asyncio.AbstractEventLoop
    outputs: "asyncio.Queue[RequestOutput | BaseException]"
    request: Pending | None = None

    def send(self, item: RequestOutput | BaseException) -> None:
        with suppress(RuntimeError):  # the event loop has been closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)


class AsyncLLM:
    """`LLM` for asyncio. Options as `LLM`; `close()` or `async with` ends the thread."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load as `LLM(model, **options)` does."""
        self.llm = LLM(model, **options)
        self.tokenizer = self.llm.tokenizer
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._clients: dict[str, _Client] = {}
        self._num_requests = 0
        self._closing = threading.Lock()  # between asking whether it is closed and joining in
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="specinfer-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Continue one prompt.

        yields  all of the output so far after every step that added to it, the last one finished
        raises  RequestError or CapacityError for a request that cannot be served, ConfigError for
                an id that is in use
        Leaving the loop early, or being cancelled, aborts the request.
        """
        params = sampling_params or self.llm.default_sampling_params()
        if params.structure is not None:  # may take a while, and steps should not wait for it
            await asyncio.to_thread(self.llm.engine.constraints.prepare, params)
        client = _Client(asyncio.get_running_loop(), asyncio.Queue())
        with self._closing:
            if self._closed:
                raise SpecInferError("this AsyncLLM is closed: make a new one")
            self._num_requests += 1
            request_id = request_id or f"request-{self._num_requests}"
            if request_id in self._clients:
                raise ConfigError(f"request_id={request_id!r} is in use by a running request")
            self._clients[request_id] = client
            self._commands.put(lambda: self._start(client, request_id, prompt, params))
        try:
            while True:
                item = await client.outputs.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._clients.pop(request_id, None)
            self._commands.put(lambda: self._end(client))

    async def abort(self, request_id: str) -> None:
        """End a request: its `generate` yields what there is, with finish_reason "abort"."""
        client = self._clients.get(request_id)
        if client is not None:
            self._commands.put(lambda: self._abort(client))

    def close(self) -> None:
        """End the thread; running requests are aborted."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    # --- in the engine's thread -------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._take_commands():
                if self.llm.engine.has_work:
                    self._step()
        finally:
            for client in list(self._clients.values()):
                if client.request is None:
                    client.send(SpecInferError("this AsyncLLM was closed"))
                else:
                    self._abort(client)

    def _take_commands(self) -> bool:
        """Run what was asked for; wait for it where there is nothing else to do."""
        block = not self.llm.engine.has_work
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _step(self) -> None:
        try:
            traces = self.llm.engine.step()
        except Exception as error:  # a failed step fails its requests; the engine goes on
            for client in list(self._clients.values()):
                if client.request is not None:
                    self._end(client)
                    client.send(error)
            return
        advanced = {trace.sequence.request_id for trace in traces}
        for request_id in advanced:
            reader = self._clients.get(request_id)
            if reader is not None and reader.request is not None:
                reader.send(reader.request.output())

    def _start(
        self, client: _Client, request_id: str, prompt: Prompt, params: SamplingParams
    ) -> None:
        if self._clients.get(request_id) is not client:
            return  # left before it began
        try:
            client.request = self.llm.submit(prompt, params, request_id)
        except Exception as error:
            client.send(error)

    def _end(self, client: _Client) -> None:
        if client.request is not None:
            self.llm.abort([client.request])

    def _abort(self, client: _Client) -> None:
        if client.request is not None and not client.request.is_finished:
            self.llm.abort([client.request])
            client.send(client.request.output())
