"""The same engine behind asyncio: one thread steps, any number of coroutines wait.

    engine thread   takes commands, steps, and hands what came of a step to the event loops
    coroutines      put commands in and read their own stream; leaving one aborts its requests

Only the engine thread touches the engine. A reader that is slower than the engine is given the
newest output and not every one between, so nothing piles up.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from specinfer.errors import ConfigError, SpecInferError
from specinfer.llm import LLM, Pending, Prompt, not_finite
from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams

Command = Callable[[], None]

_log = logging.getLogger("specinfer")


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """What a step did for one prompt of a stream.

    index        which of the stream's prompts
    output       all of its output so far; of trees, those since the last update
    time_s       when the step ended, by the clock of `time.perf_counter`
    scheduled_s  when it was first computed, by the same clock
    """

    index: int
    output: RequestOutput
    time_s: float
    scheduled_s: float | None


@dataclass(slots=True, eq=False)
class OutputStream:
    """The outputs of prompts that were submitted together, as they come; for one reader.

    Iterating yields the updates of all prompts and ends when every one has finished.
    """

    request_ids: Sequence[str]
    _owner: "AsyncLLM"
    _loop: asyncio.AbstractEventLoop
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _updates: dict[int, StepUpdate] = field(default_factory=dict)
    _num_unfinished: int = 0
    _error: BaseException | None = None
    _is_accepted: bool = False
    _is_closed: bool = False
    _requests: list[Pending] = field(default_factory=list)  # the engine thread's

    def __post_init__(self) -> None:
        self._num_unfinished = len(self.request_ids)

    async def accepted(self) -> None:
        """Wait until the engine has queued every prompt.

        raises  RequestError or CapacityError where one cannot be served: then none is
        """
        while not self._is_accepted and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    def __aiter__(self) -> AsyncIterator[StepUpdate]:
        return self

    async def __anext__(self) -> StepUpdate:
        while not self._updates:
            if self._error is not None:
                raise self._error
            if not self._num_unfinished:
                raise StopAsyncIteration
            await self._wait()
        update = self._updates.pop(next(iter(self._updates)))
        self._num_unfinished -= update.output.finished
        return update

    def close(self) -> None:
        """Abort what has not finished: before the engine's next step, and its pages are free."""
        if not self._is_closed:
            self._is_closed = True
            self._owner._forget(self)

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    # --- told by the engine thread, in the event loop's ---------------------------------------

    def _accept(self) -> None:
        self._is_accepted = True
        self._news.set()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._news.set()

    def _take(self, update: StepUpdate) -> None:
        unread = self._updates.get(update.index)
        if unread is not None:  # an output holds all before it, trees excepted
            update.output.trees[:0] = unread.output.trees
        self._updates[update.index] = update
        self._news.set()


class AsyncLLM:
    """`LLM` for asyncio. Options as `LLM`; `close()` or `async with` ends the thread."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load as `LLM(model, **options)` does."""
        self._start_thread(LLM(model, **options))

    @classmethod
    def of(cls, llm: LLM) -> "AsyncLLM":
        """Serve an `LLM` that is loaded; from now on nobody else may use it."""
        served = cls.__new__(cls)
        served._start_thread(llm)
        return served

    def _start_thread(self, llm: LLM) -> None:
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, tuple[OutputStream, int]] = {}
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

        yields  all of the output so far after steps that added to it, the last one finished
        raises  RequestError or CapacityError for a request that cannot be served, ConfigError for
                an id that is in use
        Leaving the loop early, or being cancelled, aborts the request.
        """
        params = sampling_params or self.llm.default_sampling_params()
        await self.prepare(params)
        stream = self.submit([(prompt, params)], request_id)
        try:
            async for update in stream:
                yield update.output
        finally:
            stream.close()

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what a request's output must be: that may take a while, and steps go on.

        In a thread of its own that nothing waits for at the end: compiling cannot be interrupted,
        and the event loop's threads have others' prompts to encode.

        raises  RequestError for a schema or grammar that cannot be understood
        """
        if params.structure is None:
            return
        compiled: Future[None] = Future()

        def compile_it() -> None:
            try:
                self.llm.engine.constraints.prepare(params)
            except BaseException as error:  # it is the caller's, whatever it is
                compiled.set_exception(error)
            else:
                compiled.set_result(None)

        compiled.set_running_or_notify_cancel()
        threading.Thread(target=compile_it, name="specinfer-grammar", daemon=True).start()
        await asyncio.wrap_future(compiled)

    def submit(
        self,
        prompts: Sequence[tuple[Prompt, SamplingParams]],
        request_id: str | None = None,
    ) -> OutputStream:
        """Continue prompts, all of them or none; close the stream when done with it.

        request_id  of one prompt; of several each gets it with "-0", "-1", … behind
        raises      ConfigError for an id that is in use
        """
        with self._closing:
            if self._closed:
                raise SpecInferError("this AsyncLLM is closed: make a new one")
            self._num_requests += 1
            base = request_id or f"request-{self._num_requests}"
            several = len(prompts) > 1
            ids = [f"{base}-{index}" if several else base for index in range(len(prompts))]
            for each in ids:
                if each in self._streams:
                    raise ConfigError(f"request_id={each!r} is in use by a running request")
            stream = OutputStream(ids, self, asyncio.get_running_loop())
            self._streams.update({each: (stream, index) for index, each in enumerate(ids)})
            self._commands.put(lambda: self._start(stream, prompts))
        return stream

    async def abort(self, request_id: str) -> None:
        """End a request: its `generate` yields what there is, with finish_reason "abort"."""
        entry = self._streams.get(request_id)
        if entry is not None:
            self._commands.put(lambda: self._abort(*entry))

    def fail_all(self, error: BaseException) -> None:
        """End every request; its reader gets this error."""
        self._commands.put(lambda: self._fail(self._all_streams(), error))

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread serves."""
        return self._thread.is_alive() and not self._closed

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

    def _forget(self, stream: OutputStream) -> None:
        for request_id in stream.request_ids:
            self._streams.pop(request_id, None)
        self._commands.put(lambda: self.llm.abort(stream._requests))

    # --- in the engine's thread -------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._take_commands():
                if self.llm.engine.has_work:
                    self._step()
        except BaseException:
            _log.critical("the engine's thread has ended", exc_info=True)
            self._end(SpecInferError("the engine has ended by a failure: make a new AsyncLLM"))
        else:
            for stream, index in list(self._streams.values()):
                if stream._requests:
                    self._abort(stream, index)
            self._end(SpecInferError("this AsyncLLM was closed"))

    def _end(self, error: SpecInferError) -> None:
        """Nobody steps any more: those who wait are told, and nobody else may join them."""
        with self._closing:
            self._closed = True
        for stream, _ in list(self._streams.values()):
            if not stream._requests or any(not each.is_finished for each in stream._requests):
                _tell(stream._loop, stream._fail, error)

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
        except Exception as error:  # a failed step fails what ran; the engine goes on
            _log.exception("a step failed, and with it the requests that ran")
            self._fail(self._broken_streams(), error)
            return
        now = time.perf_counter()
        advanced = dict.fromkeys(trace.sequence.request_id for trace in traces)
        news: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, StepUpdate]]] = {}
        for request_id in advanced:
            entry = self._streams.get(request_id)
            if entry is not None:
                stream, index = entry
                news.setdefault(stream._loop, []).append((stream, _update(stream, index, now)))
        for loop, updates in news.items():
            _tell(loop, _hand_over, updates)
        if self.llm.engine.broken:
            for stream in self._broken_streams():
                self._fail([stream], not_finite(stream.request_ids[0]))

    def _broken_streams(self) -> list[OutputStream]:
        """Streams the failed step ended; all, where it ended none: they must not wait for ever."""
        broken = self.llm.engine.broken
        if not broken:
            return self._all_streams()
        entries = [self._streams.get(sequence.request_id) for sequence in broken]
        return list(dict.fromkeys(entry[0] for entry in entries if entry is not None))

    def _all_streams(self) -> list[OutputStream]:
        """Those that have begun and not ended."""
        streams = dict.fromkeys(stream for stream, _ in list(self._streams.values()))
        return [s for s in streams if any(not request.is_finished for request in s._requests)]

    def _fail(self, streams: Sequence[OutputStream], error: BaseException) -> None:
        for stream in streams:
            self.llm.abort(stream._requests)
            _tell(stream._loop, stream._fail, error)

    def _start(
        self, stream: OutputStream, prompts: Sequence[tuple[Prompt, SamplingParams]]
    ) -> None:
        if stream._is_closed:
            return  # left before it began
        try:
            for request_id, (prompt, params) in zip(stream.request_ids, prompts, strict=True):
                stream._requests.append(self.llm.submit(prompt, params, request_id))
        except Exception as error:
            self.llm.abort(stream._requests)
            stream._requests.clear()
            _tell(stream._loop, stream._fail, error)
        else:
            _tell(stream._loop, stream._accept)

    def _abort(self, stream: OutputStream, index: int) -> None:
        if index >= len(stream._requests) or stream._requests[index].is_finished:
            return
        self.llm.abort([stream._requests[index]])
        _tell(stream._loop, stream._take, _update(stream, index, time.perf_counter()))


def _update(stream: OutputStream, index: int, now: float) -> StepUpdate:
    request = stream._requests[index]
    started = [each.scheduled_s for each in request.sequences if each.scheduled_s is not None]
    return StepUpdate(
        index=index,
        output=request.output(),
        time_s=now,
        scheduled_s=min(started, default=None),
    )


def _hand_over(updates: Sequence[tuple[OutputStream, StepUpdate]]) -> None:
    for stream, update in updates:
        stream._take(update)


def _tell(loop: asyncio.AbstractEventLoop, say: Callable[..., None], *words: Any) -> None:
    with suppress(RuntimeError):  # the event loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(say, *words)
