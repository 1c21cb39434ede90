"""From a run through the engine to an answer: one body, or a stream of chunks."""

import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from specinfer import __version__
from specinfer.async_llm import StepUpdate
from specinfer.outputs import CompletionOutput, RequestOutput
from specinfer.serve.errors import as_api_error
from specinfer.serve.schema import SamplingBody, StreamOptions
from specinfer.serve.sse import DONE, EventStream, encode, event, until_disconnect
from specinfer.serve.state import Run, Service
from specinfer.serve.trees import tree_event
from specinfer.serve.usage import metrics_of, usage_of

Json = dict[str, Any]


class Shape(Protocol):
    """How one of the two endpoints writes its choices."""

    name: str
    """Of the whole answer's object."""
    chunk_name: str
    """Of a chunk's object."""

    def opening(self) -> list[Json]:
        """Choices of the chunks that come before anything is known."""
        ...

    def step(self, prompt: int, output: RequestOutput, each: CompletionOutput) -> list[Json]:
        """Choices of the chunks that tell what is new in one continuation; [] for nothing."""
        ...

    def empty(self, prompt: int, sample: int) -> Json:
        """A choice of a chunk that adds nothing to the text."""
        ...

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """What the whole answer has beside usage: its choices, and perhaps more."""
        ...


async def respond(
    service: Service, run: Run, shape: Shape, body: SamplingBody, request: Request, head: Json
) -> Response:
    """Answer, at once or as a stream; the run is closed when it is over.

    head  what answer and chunks begin with
    """
    head = head | {"created": int(time.time()), "system_fingerprint": f"specinfer-{__version__}"}
    if body.stream:
        events = _stream(service, run, shape, body, head)
        stall_s = service.settings.stall_timeout_s
        return EventStream(events, run.close, stall_s=stall_s, deadline=run.deadline)
    try:
        outputs = await until_disconnect(request.receive, _collect(run))
    finally:
        run.close()
    answer = head | {"object": shape.name} | shape.whole(outputs) | {"usage": usage_of(outputs)}
    if body.include_metrics:
        answer["metrics"] = metrics_of(outputs)
    return Response(encode(answer), media_type="application/json")


async def _collect(run: Run) -> list[RequestOutput]:
    outputs: dict[int, RequestOutput] = {}
    async for update in run:
        outputs[update.index] = update.output
    return [outputs[index] for index in sorted(outputs)]


async def _stream(
    service: Service, run: Run, shape: Shape, body: SamplingBody, head: Json
) -> AsyncIterator[bytes]:
    options = body.stream_options or StreamOptions()
    head = head | {"object": shape.chunk_name}
    if options.include_usage:
        head["usage"] = None
    outputs: dict[int, RequestOutput] = {}
    try:
        for choice in shape.opening():
            yield event(head | {"choices": [choice]})
        async for update in run:
            outputs[update.index] = update.output
            chunks = _chunks(service, shape, update)  # first: it leaves out what is nobody's
            if options.continuous_usage_stats:
                head["usage"] = usage_of(outputs.values())
            for chunk in chunks:
                yield event(head | chunk)
        last: Json = {"usage": usage_of(outputs.values())} if options.include_usage else {}
        if body.include_metrics:
            last["metrics"] = metrics_of(outputs.values())
        if last:
            yield event(head | {"choices": []} | last)
    except Exception as error:  # the status has been sent: the stream itself has to say it
        run.note_error(error)
        yield event(as_api_error(error).body)
    yield DONE


def _chunks(service: Service, shape: Shape, update: StepUpdate) -> list[Json]:
    """What an update adds, tree by tree and choice by choice."""
    chunks: list[Json] = []
    trees = _trees(service, update) if update.output.trees else {}
    for each in update.output.outputs:
        choices = shape.step(update.index, update.output, each)
        of_steps = trees.get(each.index, ())
        # An update may hold several steps: the text comes with the last one's tree.
        missing = len(of_steps) - (1 if choices else 0)
        choices = [shape.empty(update.index, each.index) for _ in range(missing)] + choices
        for number, choice in enumerate(choices):
            tree = {"tree": of_steps[number]} if number < len(of_steps) else {}
            chunks.append({"choices": [choice], **tree})
    return chunks


def _trees(service: Service, update: StepUpdate) -> dict[int, list[Json]]:
    """Per sample, the trees of its steps since the last update."""
    trees: dict[int, list[Json]] = {}
    for step in update.output.trees:
        trees.setdefault(step.index, []).append(tree_event(step, service.text_of))
    return trees
