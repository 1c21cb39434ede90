"""`/v1/completions`: prompts in, continuations out."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.outputs import CompletionOutput, RequestOutput
from specinfer.serve.deltas import Sent
from specinfer.serve.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from specinfer.serve.params import check_stream, completion_params
from specinfer.serve.prompts import completion_prompts
from specinfer.serve.respond import Json, respond
from specinfer.serve.schema import CompletionRequest
from specinfer.serve.state import Service


async def create_completion(
    service: Service, body: CompletionRequest, request: Request
) -> Response:
    """Continue prompts."""
    model = service.resolve_model(body.model)
    options = check_stream(body)
    params = completion_params(service.llm.llm, body, include_tree=options.include_tree)
    tokenizer = service.llm.tokenizer
    # Off the event loop: a long prompt takes a while, and others' streams should not.
    prompts = await asyncio.to_thread(completion_prompts, tokenizer, body)
    answer_id = f"cmpl-{request.state.request_id}"
    run = await service.start(prompts, params, answer_id, request.state, body.prompt)
    names = service.token_names(as_ids=body.return_tokens_as_token_ids)
    shape = CompletionShape(body, prompts, names)
    return await respond(service, run, shape, body, request, {"id": answer_id, "model": model})


class CompletionShape:
    """How completions write their choices: those of the first prompt first."""

    name = "text_completion"
    chunk_name = "text_completion"

    def __init__(
        self, body: CompletionRequest, prompts: Sequence[Sequence[int]], names: TokenNames
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._names = names
        self._n = body.n or 1
        self._sent = [Sent() for _ in range(len(prompts) * self._n)]
        self._offsets = [0] * len(self._sent)

    def opening(self) -> list[Json]:
        """Nothing: completions have no role."""
        return []

    def empty(self, prompt: int, sample: int) -> Json:
        """See `Shape`."""
        index = prompt * self._n + sample
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def step(self, prompt: int, output: RequestOutput, each: CompletionOutput) -> list[Json]:
        """See `Shape`."""
        sent = self._sent[prompt * self._n + each.index]
        if sent.is_over:
            return []
        choice = self._advance(prompt, output, each)
        is_empty = not choice["text"] and not choice.get("token_ids") and not choice["logprobs"]
        return [] if is_empty and not sent.is_over else [choice]

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """See `Shape`."""
        choices = [
            self._advance(prompt, output, each)
            for prompt, output in enumerate(outputs)
            for each in output.outputs
        ]
        return {"choices": choices}

    def _advance(self, prompt: int, output: RequestOutput, each: CompletionOutput) -> Json:
        """What is new, the prompt before it where it is to be echoed."""
        index = prompt * self._n + each.index
        sent = self._sent[index]
        is_first = not sent.has_begun
        if self._body.echo and self._body.max_tokens == 0:
            _leave_out_text(each)
        delta = sent.advance(each)
        text, token_ids, places = delta.text, delta.token_ids, delta.logprobs
        of_prompt: Any = output.prompt_logprobs
        if is_first and self._body.echo:
            text = self._echo(prompt) + text
            token_ids = [*self._prompts[prompt], *token_ids]
            if places is not None and of_prompt is not None:
                places = [*of_prompt, *places]
        choice: Json = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
        }
        if places is not None:
            choice["logprobs"] = self._logprobs(index, token_ids, places)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = list(self._prompts[prompt])
        top = self._body.prompt_logprobs
        if is_first and top is not None and of_prompt is not None:
            choice["prompt_logprobs"] = prompt_logprobs(of_prompt, top)
        return choice

    def _echo(self, prompt: int) -> str:
        """The prompt as it was written, or the text of its tokens."""
        given = self._body.prompt
        if isinstance(given, str):
            return given
        if isinstance(given[prompt], str):
            return str(given[prompt])
        return self._names.decode(self._prompts[prompt])

    def _logprobs(self, index: int, token_ids: Sequence[int], places: Sequence[Any]) -> Json:
        top, offset = self._body.logprobs or 0, self._offsets[index]
        shape = completion_logprobs(token_ids, places, top, self._names, offset)
        self._offsets[index] += sum(map(len, shape["tokens"]))
        return shape


def _leave_out_text(each: CompletionOutput) -> None:
    """Only the prompt was asked for: the token that was made to read its laws is nobody's."""
    each.text = ""
    each.token_ids.clear()
    places: Any = each.logprobs
    if places is not None:
        places.clear()
    if each.finish_reason is not None:
        each.finish_reason, each.stop_reason = "length", None
