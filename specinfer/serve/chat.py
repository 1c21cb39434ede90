"""`/v1/chat/completions`: messages in, an answer or tool calls out."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.errors import RequestError
from specinfer.outputs import CompletionOutput, RequestOutput
from specinfer.serve.deltas import Delta, Sent
from specinfer.serve.errors import ApiError
from specinfer.serve.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from specinfer.serve.params import chat_params, check_stream
from specinfer.serve.prompts import chat_prompt
from specinfer.serve.respond import Json, respond
from specinfer.serve.schema import ChatRequest
from specinfer.serve.state import Service
from specinfer.serve.toolcalls import ToolDelta
from specinfer.serve.tools import ToolUse


async def create_chat_completion(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    model = service.resolve_model(body.model)
    options = check_stream(body)
    tokenizer = service.llm.tokenizer
    tools = ToolUse.of(body, tokenizer, service.settings.tool_call_parser)
    asked = chat_params(
        service.llm.llm, body, include_tree=options.include_tree, **tools.sampling_fields()
    )
    params = tools.held(asked)
    # Off the event loop: a long prompt takes a while, and others' streams should not.
    text = await asyncio.to_thread(chat_prompt, tokenizer, body, tools.prompt_tools())
    prompt = await service.encode(text, add_special_tokens=body.add_special_tokens is True)
    answer_id = f"chatcmpl-{request.state.request_id}"
    try:
        run = await service.start([prompt], params, answer_id, request.state, text)
    except (ApiError, RequestError) as error:
        raise await tools.explained(error, params, service.prepare) from None
    shape = ChatShape(body, tools, service.token_names(as_ids=body.return_tokens_as_token_ids))
    return await respond(service, run, shape, body, request, {"id": answer_id, "model": model})


class ChatShape:
    """How chats write their choices."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, tools: ToolUse, names: TokenNames) -> None:
        self._body = body
        self._tools = tools
        self._names = names
        self._continuations = [_Continuation(tools) for _ in range(body.n or 1)]

    def opening(self) -> list[Json]:
        """The role, once per continuation."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(index, delta) for index in range(len(self._continuations))]

    def empty(self, prompt: int, sample: int) -> Json:
        """See `Shape`."""
        return self._choice(sample, {"content": ""})

    def step(self, prompt: int, output: RequestOutput, each: CompletionOutput) -> list[Json]:
        """See `Shape`; the last one of a continuation has its finish_reason and no text."""
        so_far = self._continuations[each.index]
        if so_far.sent.is_over:
            return []
        delta = so_far.sent.advance(each)
        choices = [self._choice(each.index, new) for new in so_far.read(delta)]
        if delta.logprobs or (self._body.return_token_ids and delta.token_ids):
            choices = choices or [self.empty(prompt, each.index)]
            choices[0] |= self._extras(delta.token_ids, delta.logprobs)
        if delta.is_last:
            end = {"finish_reason": so_far.finish_reason(each), "stop_reason": each.stop_reason}
            choices.append(self._choice(each.index, {}) | end)
        return choices

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """See `Shape`."""
        [output] = outputs
        more: Json = {}
        if self._body.return_token_ids:
            more["prompt_token_ids"] = output.prompt_token_ids
        of_prompt: Any = output.prompt_logprobs
        if of_prompt is not None:
            more["prompt_logprobs"] = prompt_logprobs(of_prompt, self._body.prompt_logprobs or 0)
        return {"choices": [self._whole_choice(each) for each in output.outputs], **more}

    def _whole_choice(self, each: CompletionOutput) -> Json:
        so_far = self._continuations[each.index]
        deltas = so_far.read(so_far.sent.advance(each))
        text = "".join(delta.get("content", "") for delta in deltas)
        calls: list[Json] = []
        for new in (call for delta in deltas for call in delta.get("tool_calls", ())):
            if new["index"] == len(calls):
                calls.append({"id": new["id"], "type": "function", "function": new["function"]})
            else:
                calls[new["index"]]["function"]["arguments"] += new["function"]["arguments"]
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": each.index,
            "message": message,
            "logprobs": None,
            "finish_reason": so_far.finish_reason(each),
            "stop_reason": each.stop_reason,
            **self._extras(each.token_ids, each.logprobs),
        }

    def _choice(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _extras(self, token_ids: list[int], places: list[Any] | None) -> Json:
        extras: Json = {}
        if places is not None:
            top = self._body.top_logprobs or 0
            extras["logprobs"] = chat_logprobs(token_ids, places, top, self._names)
        if self._body.return_token_ids:
            extras["token_ids"] = token_ids
        return extras


class _Continuation:
    """One sample: what was sent of it, and the calls found in it."""

    def __init__(self, tools: ToolUse) -> None:
        self.sent = Sent()
        self._tools = tools
        self._reader = tools.reader()
        self._has_begun = False

    def read(self, delta: Delta) -> list[Json]:
        """New text as deltas of messages."""
        if self._tools.choice == "named":
            begins, self._has_begun = not self._has_begun, True
            name = self._tools.name if begins else None
            new = [ToolDelta(call=0, name=name, arguments=delta.text)]
            return [self._as_message(each) for each in new if name or each.arguments]
        if self._reader is None:
            return [{"content": delta.text}] if delta.text else []
        new = self._reader.push(delta.text)
        if delta.is_last:
            new += self._reader.flush()
        return [self._as_message(each) for each in new]

    def finish_reason(self, each: CompletionOutput) -> str | None:
        """OpenAI's: of calls that the model chose to make, "tool_calls"."""
        has_calls = self._reader is not None and self._reader.num_calls > 0
        return "tool_calls" if has_calls and each.finish_reason == "stop" else each.finish_reason

    def _as_message(self, delta: ToolDelta) -> Json:
        if delta.call is None:
            return {"content": delta.text}
        call: Json = {"index": delta.call, "function": {"arguments": delta.arguments}}
        if delta.name is not None:
            call |= {"id": self._tools.new_id(), "type": "function"}
            call["function"] = {"name": delta.name, "arguments": delta.arguments}
        return {"tool_calls": [call]}
