"""`/tokenize` and `/detokenize`, as vLLM has them."""

import asyncio
from typing import Any

from specinfer.serve.errors import ApiError
from specinfer.serve.prompts import chat_prompt
from specinfer.serve.schema import DetokenizeRequest, TokenizeRequest
from specinfer.serve.state import Service


async def create_tokens(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a text, or of messages through the chat template."""
    service.resolve_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    tokenizer, text = service.llm.tokenizer, body.prompt
    is_chat = text is None
    if text is None:
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] or None
        text = await asyncio.to_thread(chat_prompt, tokenizer, body, tools)
    special = body.add_special_tokens
    # A template brings its own special tokens.
    special = not is_chat if special is None else special
    tokens = await service.encode(text, add_special_tokens=special)
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.llm.llm.engine.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.backend.id_to_token(token) for token in tokens]
    return answer


async def create_text(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    service.resolve_model(body.model)
    vocab_size = service.llm.llm.engine.target.vocab_size
    for token in body.tokens:
        if token >= vocab_size:
            message = f"tokens has id {token} and the model's ids are 0 to {vocab_size - 1}"
            raise ApiError(400, message, code="invalid_value", param="tokens")
    text = await asyncio.to_thread(
        service.llm.tokenizer.decode, body.tokens, skip_special_tokens=False
    )
    return {"prompt": text}
