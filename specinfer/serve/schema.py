"""Request bodies: OpenAI's fields, vLLM's further ones, and `speculation`.

A field that is not here is refused by name, for what is not understood cannot be obeyed; null is as
good as absent. Fields that only label a request are taken and change nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from specinfer.config import Control, Draw, VerifierName
from specinfer.structured import MAX_DEPTH, is_deeper

UNSUPPORTED: Mapping[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "spaces_between_special_tokens": True,
    "modalities": ["text"],
}
"""Fields of other servers, and the value that asks for what happens anyway: that one is taken."""

MAX_SAMPLES = 128
MAX_LOGPROBS = 20


def _check_depth(value: Any) -> Any:
    if is_deeper(value, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep: make it flatter")
    return value


# JSON's own kinds: no number as text, no true as 1
Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIds = list[Annotated[Int, Field(ge=0, lt=1 << 31)]]
Json = Annotated[dict[str, Any], AfterValidator(_check_depth)]


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothings(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None and (name in cls.model_fields or value != UNSUPPORTED.get(name))
        }


class SpeculationOptions(Body):
    """This request's own way to guess; left out: the server's (see `Speculation`)."""

    tree: Annotated[str, Field(max_length=2048)] = "auto"
    verifier: VerifierName = "auto"
    max_nodes: Int | None = None
    max_depth: Int | None = None
    draft_temperature: Number | None = None
    draw: Draw = "auto"
    control: Control = "auto"


class Prediction(Body):
    """What the output is expected to repeat for the most part (OpenAI's predicted outputs)."""

    type: Literal["content"] = "content"
    content: "str | list[TextPart]"


class StreamOptions(Body):
    """What a stream carries beside the text.

    include_usage           a last chunk with usage and no choices
    continuous_usage_stats  usage so far in every chunk (vLLM)
    include_tree            each step's token tree, as `tree` of the step's chunk
    """

    include_usage: Flag = False
    continuous_usage_stats: Flag = False
    include_tree: Flag = False
    include_obfuscation: Literal[False] = False


class SamplingBody(Body):
    """How to sample, in OpenAI's names and vLLM's; left out: the model's own defaults."""

    model: str | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Annotated[Int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    response_format: Json | None = None
    # vLLM's
    top_k: Int | None = None
    min_p: Number | None = None
    min_tokens: Int | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[Annotated[str, Field(max_length=1024)]] | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    structured_outputs: Json | None = None
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Int | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: Flag | None = None
    return_token_ids: Flag = False
    return_tokens_as_token_ids: Flag = False
    # ours
    speculation: SpeculationOptions | None = None
    target_tpot_s: Number | None = None
    include_metrics: Flag = False
    # labels: they change nothing
    user: str | None = None
    metadata: Json | None = None
    store: Flag | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SamplingBody):
    """`/v1/completions`."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    echo: Flag = False
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TextPart(Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call as the model made it; arguments is JSON as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message; further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_depth(cls, message: Any) -> Any:
        return _check_depth(message)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Body):
    """What a tool is called, what it is for, and its parameters as a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: Flag | None = None


class Tool(Body):
    """A function the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function by name."""

    name: str


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingBody):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=0)] | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag = True
    chat_template_kwargs: Json | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False


class TokenizeRequest(Body):
    """`/tokenize`: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    chat_template_kwargs: Json | None = None
    return_token_strs: Flag = False


class DetokenizeRequest(Body):
    """`/detokenize`: token ids to text, special tokens included."""

    model: str | None = None
    tokens: TokenIds


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorObject
