"""Messages and prompts → token ids."""

import json
from collections.abc import Sequence
from typing import Any

from specinfer.errors import RequestError
from specinfer.serve.errors import ApiError
from specinfer.serve.schema import ChatRequest, CompletionRequest, Message, TokenizeRequest
from specinfer.text.tokenizer import Tokenizer

_END = "\ue000"
"""A private character that stands where the last message ends, to be cut there."""


def chat_prompt(
    tokenizer: Tokenizer,
    body: ChatRequest | TokenizeRequest,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The text that messages stand for, by the model's chat template.

    raises  RequestError if the template refuses them
    """
    messages = [plain_message(message) for message in body.messages or ()]
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if taken := options.keys() & {"messages", "tools", "template", "add_generation_prompt"}:
        raise ApiError(400, f"{min(taken)} cannot be set in here", param="chat_template_kwargs")
    if not body.continue_final_message:
        return tokenizer.render_chat(
            messages, tools=tools, add_generation_prompt=body.add_generation_prompt, **options
        )
    last = messages[-1]
    if "add_generation_prompt" in body.model_fields_set and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt exclude each other: give one",
            param="continue_final_message",
        )
    if last["role"] != "assistant" or not last.get("content"):
        raise ApiError(
            400,
            "continue_final_message needs a last message of the assistant with content",
            param="continue_final_message",
        )
    messages[-1] = last | {"content": last["content"] + _END}
    text = tokenizer.render_chat(messages, tools=tools, add_generation_prompt=False, **options)
    kept, found, _ = text.rpartition(_END)
    if not found:
        raise RequestError("the model's chat template leaves out the message to be continued")
    return kept


def plain_message(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    plain = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    if message.role == "developer":  # the newer word for it
        plain["role"] = "system"
    for call in plain.get("tool_calls") or ():
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return plain


def completion_prompts(tokenizer: Tokenizer, body: CompletionRequest) -> list[list[int]]:
    """The prompts of one body, which has one or several, as text or as token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        given: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        given = [prompt]
    else:
        given = list(prompt)
    if not given:
        raise ApiError(400, "prompt is empty: give at least one token", param="prompt")
    special = body.add_special_tokens is not False
    return [
        tokenizer.encode(each, add_special_tokens=special) if isinstance(each, str) else each
        for each in given
    ]


def _arguments(text: str) -> Any:
    """Templates want the object that OpenAI has as text."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise ApiError(400, "a tool call's arguments must be JSON", param="messages") from None
