"""What all requests share: the engine, the settings, and how many may wait."""

import asyncio
import itertools
import time
from collections.abc import Sequence

from specinfer.async_llm import AsyncLLM, OutputStream, StepUpdate
from specinfer.request import SamplingParams
from specinfer.serve.errors import ApiError
from specinfer.serve.params import check_room
from specinfer.serve.settings import ServerSettings


class Service:
    """One model, served.

    model_names  what clients may call it, the first one in answers
    created      when it began to serve, in seconds since 1970
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, model: str) -> None:
        self.llm = llm
        self.settings = settings
        self.model_names = tuple(settings.served_model_name) or (model,)
        self.created = int(time.time())
        self._num_places = llm.llm.engine.config.max_num_seqs + settings.max_waiting
        self._num_taken = 0
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

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        request_id: str,
    ) -> "Run":
        """Have the engine take prompts.

        raises  what refuses them: RequestError, CapacityError, or ApiError 503 where too many wait
        """
        for prompt in prompts:
            check_room(self.llm.llm, len(prompt), params, self.settings.max_prompt_tokens)
        num = len(prompts) * params.n
        if num > self._num_places:
            raise ApiError(
                400,
                f"the request asks for {num} continuations and the server takes "
                f"{self._num_places} at once: split it",
            )
        if self._num_taken + num > self._num_places:
            raise ApiError(
                503,
                "too many requests wait: try again in a moment",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        name = f"{request_id}/{next(self._numbers)}"  # clients may send one id twice
        stream = self.llm.submit([(prompt, params) for prompt in prompts], name)
        self._num_taken += num
        run = Run(self, stream, num)
        try:
            async with asyncio.timeout_at(run.deadline):
                await stream.accepted()
        except BaseException:
            run.close()
            raise
        return run

    def _leave(self, num: int) -> None:
        self._num_taken -= num


class Run:
    """A request in the engine: iterate over its updates, and close it."""

    def __init__(self, service: Service, stream: OutputStream, num: int) -> None:
        self._service = service
        self._stream = stream
        self._num = num
        timeout_s = service.settings.request_timeout_s
        now = asyncio.get_running_loop().time()
        self.deadline = None if timeout_s is None else now + timeout_s

    def __aiter__(self) -> "Run":
        return self

    async def __anext__(self) -> StepUpdate:
        async with asyncio.timeout_at(self.deadline):
            return await self._stream.__anext__()

    def close(self) -> None:
        """Give its place back; what still runs is aborted."""
        if self._num:
            self._stream.close()
            self._service._leave(self._num)
            self._num = 0
