"""`/v1/chat/completions`: messages in, an answer out, at once or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.async_llm import StepUpdate
from specinfer.request import RequestOutput
from specinfer.serve.deltas import Sent
from specinfer.serve.errors import as_api_error
from specinfer.serve.params import chat_params
from specinfer.serve.schema import ChatRequest, Message, StreamOptions
from specinfer.serve.sse import DONE, EventStream, encode, event, until_disconnect
from specinfer.serve.state import Run, Service
from specinfer.serve.trees import tree_event
from specinfer.serve.usage import usage_of


async def create_chat_completion(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer."""
    model = service.resolve_model(body.model)
    prompt = await asyncio.to_thread(render, service, body)
    answer_id = f"chatcmpl-{request.state.request_id}"
    options = body.stream_options or StreamOptions()
    params = chat_params(service.llm.llm, body, include_tree=options.include_tree)
    run = await service.start([prompt], params, answer_id)
    head = {"id": answer_id, "created": int(time.time()), "model": model}
    if body.stream:
        return EventStream(_stream(service, run, head, params.n, options), run.close)
    try:
        output = await until_disconnect(request.receive, _last(run))
    finally:
        run.close()
    return Response(encode(_whole(output, head)), media_type="application/json")


def render(service: Service, body: ChatRequest) -> list[int]:
    """The prompt that the messages stand for."""
    return service.llm.tokenizer.apply_chat_template(
        [plain_message(message) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        **(body.chat_template_kwargs or {}),
    )


def plain_message(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    plain = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer":
        plain["role"] = "system"
    return plain


async def _last(run: Run) -> RequestOutput:
    async for update in run:
        output = update.output
    return output


def _whole(output: RequestOutput, head: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "index": each.index,
            "message": {"role": "assistant", "content": each.text, "refusal": None},
            "logprobs": None,
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
        }
        for each in output.outputs
    ]
    return head | {"object": "chat.completion", "choices": choices, "usage": usage_of([output])}


async def _stream(
    service: Service, run: Run, head: dict[str, Any], n: int, options: StreamOptions
) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}
    if options.include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return head | {"choices": [choice]}

    sent = [Sent() for _ in range(n)]
    is_done = [False] * n
    try:
        for index in range(n):
            yield event(chunk(index, {"role": "assistant", "content": ""}))
        async for update in run:
            trees = _trees(service, update)
            for each in update.output.outputs:
                delta = sent[each.index].advance(each)
                *earlier, last = trees.get(each.index) or [None]
                for tree in earlier:  # steps whose text comes with the last one's
                    yield event(chunk(each.index, {"content": ""}) | {"tree": tree})
                if delta.text or last:
                    value = chunk(each.index, {"content": delta.text})
                    yield event(value if last is None else value | {"tree": last})
                if delta.is_last and not is_done[each.index]:
                    is_done[each.index] = True
                    yield event(
                        chunk(
                            each.index,
                            {},
                            finish_reason=each.finish_reason,
                            stop_reason=each.stop_reason,
                        )
                    )
        if options.include_usage:
            yield event(head | {"choices": [], "usage": usage_of([update.output])})
    except Exception as error:
        yield event(as_api_error(error).body)
    yield DONE


def _trees(service: Service, update: StepUpdate) -> dict[int, list[Any]]:
    """Per sample, the trees of its steps since the last update."""
    tokenizer = service.llm.tokenizer
    trees: dict[int, list[Any]] = {}
    for step in update.output.trees:
        trees.setdefault(step.index, []).append(
            tree_event(step, lambda token: tokenizer.decode([token], skip_special_tokens=False))
        )
    return trees
