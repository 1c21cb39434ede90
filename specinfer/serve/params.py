"""Request bodies → `SamplingParams`: the same names where there are, and OpenAI's spellings."""

from typing import Any

from specinfer.llm import LLM
from specinfer.request import SamplingParams
from specinfer.serve.errors import ApiError
from specinfer.serve.schema import ChatRequest, CompletionRequest, SamplingBody, StreamOptions

_SAME_NAMES = (
    *("n", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids"),
    *("min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words"),
    *("allowed_token_ids", "prompt_logprobs", "priority", "cache_salt"),
    "target_tpot_s",
)
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older spellings of structured_outputs."""


def check_stream(body: SamplingBody) -> StreamOptions:
    """What the stream carries.

    raises  ApiError for options of a stream where there is none
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")
    return body.stream_options or StreamOptions()


def completion_params(llm: LLM, body: CompletionRequest, **more: Any) -> SamplingParams:
    """How to continue a prompt.

    more    fields that are no part of the body
    raises  ConfigError or ApiError for what cannot be
    """
    fields = _common_fields(body) | more
    if body.max_tokens is not None:
        # Echoing alone: the one token it takes to read the prompt's laws is not returned.
        fields["max_tokens"] = max(1, body.max_tokens) if body.echo else body.max_tokens
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
        if body.echo:
            fields["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return llm.default_sampling_params(**fields)


def chat_params(llm: LLM, body: ChatRequest, **more: Any) -> SamplingParams:
    """How to answer; max_tokens defaults to the rest of the context.

    more    fields that are no part of the body
    raises  ConfigError or ApiError for what cannot be
    """
    fields = _common_fields(body)
    if fields.get("skip_special_tokens") and more.get("skip_special_tokens") is False:
        raise ApiError(
            400,
            "skip_special_tokens cannot be true with tools, whose calls are found by special "
            "tokens: leave it out",
            param="skip_special_tokens",
        )
    fields |= more
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens differ: give one",
                param="max_completion_tokens",
            )
        fields["max_tokens"] = body.max_completion_tokens
    elif body.max_tokens is not None:
        fields["max_tokens"] = body.max_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return llm.default_chat_params(**fields)


def check_room(llm: LLM, num_prompt: int, params: SamplingParams, limit: int | None) -> None:
    """Refuse what the context cannot hold, instead of cutting it short.

    limit   tokens a prompt may have; None: what the context holds
    raises  ApiError
    """
    if limit is not None and num_prompt > limit:
        message = f"the prompt has {num_prompt} tokens and the server takes {limit}: shorten it"
        raise ApiError(400, message, code="context_length_exceeded")
    context = llm.engine.max_model_len
    wanted = params.max_tokens or 1
    if num_prompt + wanted > context:
        message = (
            f"the prompt has {num_prompt} tokens and {wanted} more are asked for, and the context "
            f"holds {context} (max_model_len): shorten the prompt or lower max_tokens"
        )
        raise ApiError(400, message, code="context_length_exceeded")


def _common_fields(body: SamplingBody) -> dict[str, Any]:
    given = body.model_fields_set
    fields = {name: getattr(body, name) for name in _SAME_NAMES if name in given}
    if body.seed is not None:
        fields["seed"] = body.seed % (1 << 64)  # OpenAI's may be negative
    if body.logit_bias:
        fields["logit_bias"] = _token_bias(body.logit_bias)
    if body.response_format is not None and body.response_format.get("type") != "text":
        fields["response_format"] = body.response_format
    structured = _structured_outputs(body)
    if structured is not None:
        fields["structured_outputs"] = structured
    if body.prediction is not None:
        content = body.prediction.content
        parts = content if isinstance(content, str) else "".join(part.text for part in content)
        fields["prediction"] = parts
    if body.speculation is not None:
        fields["speculation"] = body.speculation.model_dump(exclude_unset=True)
    return fields


def _token_bias(asked: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers as keys."""
    try:
        return {int(token): bias for token, bias in asked.items()}
    except ValueError:
        raise ApiError(
            400, 'logit_bias must name tokens by id, such as {"50": -100}', param="logit_bias"
        ) from None


def _structured_outputs(body: SamplingBody) -> dict[str, Any] | None:
    asked = {
        ours: getattr(body, older)
        for older, ours in _GUIDED.items()
        if getattr(body, older) is not None
    }
    if body.structured_outputs is None:
        return asked or None
    if asked:
        raise ApiError(
            400,
            "structured_outputs and a guided_… field are both given: give one",
            param="structured_outputs",
        )
    return body.structured_outputs
