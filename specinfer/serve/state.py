"""What all requests share: the engine, the settings, the metrics, and how many may wait."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import State

from specinfer.async_llm import AsyncLLM, OutputStream, StepUpdate
from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams
from specinfer.serve.errors import ApiError
from specinfer.serve.logprobs import TokenNames
from specinfer.serve.metrics import Metrics, Timeline
from specinfer.serve.params import check_room
from specinfer.serve.settings import ServerSettings

_SHORT = 2_000
"""Characters that are encoded sooner than another thread could be asked to."""

_MOST_COMPILING = 4
"""Grammars compiled at once: some take for ever, and others' requests go on meanwhile."""


class Service:
    """One model, served.

    model        its folder or id
    model_names  what clients may call it, the first one in answers
    num_taken    continuations that run or wait
    is_draining  whether the server is going down: what runs may finish, nothing new begins
    created      when it began to serve, in seconds since 1970
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, model: str) -> None:
        self.llm = llm
        self.settings = settings
        self.model = model
        self.model_names = tuple(settings.served_model_name) or (model,)
        self.created = int(time.time())
        self.metrics = Metrics(llm.llm.engine, self.model_names[0], settings.metrics_prefix)
        self.num_taken = 0
        self.is_draining = False
        self._compiling: set[asyncio.Future[None]] = set()
        self._numbers = itertools.count()

    def resolve_model(self, asked: str | None) -> str:
        """The name to answer with.

        raises  ApiError 404 for a model that is not served
        """
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise ApiError(
                404,
                f"the model {asked!r} is not served here: use {', '.join(self.model_names)}",
                code="model_not_found",
                param="model",
            )
        return asked

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; of a long text off the event loop, so that others' streams go on."""
        if len(text) < _SHORT:
            return self.llm.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.llm.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    def text_of(self, token_id: int) -> str:
        """A token's own text, special ones as they are written."""
        return self.llm.tokenizer.decode([token_id], skip_special_tokens=False)

    def token_names(self, *, as_ids: bool) -> TokenNames:
        """How log-probabilities write tokens."""
        pieces = self.llm.tokenizer.pieces
        return TokenNames(
            lambda ids: self.llm.tokenizer.decode(ids, skip_special_tokens=False),
            None if pieces is None else pieces.__getitem__,
            as_ids,
        )

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        answer_id: str,
        state: State,
        text: Any = None,
    ) -> "Run":
        """Have the engine take prompts.

        state   the request's: when it arrived, and what the log will say of it
        text    the prompts as they were given, for the log where it may have them
        raises  what refuses them: RequestError, CapacityError, or ApiError 503 where too many wait
        """
        state.note |= {"id": answer_id, "prompt_tokens": sum(map(len, prompts))}
        if self.settings.log_prompts:
            state.note["prompt"] = text
        for prompt in prompts:
            check_room(self.llm.llm, len(prompt), params, self.settings.max_prompt_tokens)
        num = len(prompts) * params.n
        await self.prepare(params)
        self._check_places(num)
        name = f"{answer_id}/{next(self._numbers)}"  # clients may send one id twice
        stream = self.llm.submit([(prompt, params) for prompt in prompts], name)
        self.num_taken += num
        timeline = Timeline(self.metrics, state.arrival_s, len(prompts), params.n)
        run = Run(self, stream, num, timeline, state)
        try:
            await stream.accepted()
        except BaseException:
            run.close()
            raise
        run.is_accepted = True
        return run

    def deadline(self, state: State) -> float | None:
        """When a request's time is over, by the event loop's clock; None: never."""
        timeout_s = self.settings.request_timeout_s
        if timeout_s is None:
            return None
        spent_s: float = time.perf_counter() - state.arrival_s
        return asyncio.get_running_loop().time() + timeout_s - spent_s

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what a request's output must be, within a time, and not too many at once.

        What takes longer goes on, for it cannot be interrupted, and keeps its place.

        raises  ApiError 400 where it takes too long, 503 where all places are taken
        """
        if params.structure is None:
            return
        if len(self._compiling) >= _MOST_COMPILING:
            raise _overloaded("too many grammars are being compiled: try again in a moment")
        compiling = asyncio.ensure_future(self.llm.prepare(params))
        self._compiling.add(compiling)
        compiling.add_done_callback(self._note_compiled)
        limit_s = self.settings.grammar_timeout_s
        done, _ = await asyncio.wait((compiling,), timeout=limit_s)
        if not done:
            raise ApiError(
                400,
                f"{params.structure_field}.{params.structure.kind} takes longer than "
                f"{limit_s:g} s to compile (grammar_timeout_s): make it simpler",
                code="invalid_value",
                param=params.structure_field,
            )
        compiling.result()

    def _note_compiled(self, compiling: "asyncio.Future[None]") -> None:
        self._compiling.discard(compiling)
        if not compiling.cancelled():
            compiling.exception()  # looked at, even where nobody waits for it any more

    def _check_places(self, num: int) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        engine, max_waiting = self.llm.llm.engine, self.settings.max_waiting
        most = engine.config.max_num_seqs + max_waiting
        if num > most:
            raise ApiError(
                400,
                f"the request asks for {num} continuations and the server takes {most} at once: "
                "split it",
            )
        if self.num_taken + num > engine.stats.num_places + max_waiting:
            raise _overloaded("too many requests wait: try again in a moment")

    def _leave(self, num: int) -> None:
        self.num_taken -= num


def _overloaded(message: str) -> ApiError:
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})


class Run:
    """A request in the engine: iterate over its updates, and close it.

    is_accepted  whether the engine took it; one that it refused never ran
    deadline     when its time is over, by the event loop's clock
    """

    def __init__(
        self,
        service: Service,
        stream: OutputStream,
        num: int,
        timeline: Timeline,
        state: State,
    ) -> None:
        self._service = service
        self._stream = stream
        self._num = num
        self._note = state.note
        self._outputs: dict[int, RequestOutput] = {}
        self._timeline = timeline
        self.is_accepted = False
        self.deadline = service.deadline(state)

    def __aiter__(self) -> "Run":
        return self

    async def __anext__(self) -> StepUpdate:
        """The next update.

        raises  TimeoutError once the time is over; whatever failed the engine's step
        """
        async with asyncio.timeout_at(self.deadline):
            update = await self._stream.__anext__()
        self._outputs[update.index] = update.output
        self._timeline.observe(update)
        return update

    def note_error(self, error: BaseException) -> None:
        """What went wrong after the status had been sent."""
        self._note["error"] = repr(error)

    def close(self) -> None:
        """Give its place back; what still runs is aborted."""
        if not self._num:
            return
        self._stream.close()
        self._service._leave(self._num)
        self._num = 0
        if self.is_accepted:
            self._timeline.close()
        if self._outputs:
            self._note_outcome()

    def _note_outcome(self) -> None:
        choices = [each for output in self._outputs.values() for each in output.outputs]
        num_steps = sum(output.stats.num_target_steps for output in self._outputs.values())
        num_tokens = sum(len(each.token_ids) for each in choices)
        reasons = {each.finish_reason or "abort" for each in choices}
        self._note |= {
            "completion_tokens": num_tokens,
            "tokens_per_step": round(num_tokens / num_steps, 2) if num_steps else 0,
            "finish_reason": ",".join(sorted(reasons)),
        }
