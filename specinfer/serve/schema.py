"""Request bodies: OpenAI's fields, vLLM's further ones, and `speculation`.

A field that is not here is refused by name, for what is not understood cannot be obeyed; null is as
good as absent. Fields that only label a request are taken and change nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specinfer.config import Control, Draw, VerifierName
from specinfer.serve.errors import UNSUPPORTED

MAX_SAMPLES = 128
MAX_LOGPROBS = 20

Stop = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 31)]]
Json = dict[str, Any]


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
    max_nodes: int | None = None
    max_depth: int | None = None
    draft_temperature: float | None = None
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

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_tree: bool = False
    include_obfuscation: Literal[False] = False


class SamplingBody(Body):
    """How to sample, in OpenAI's names and vLLM's; left out: the model's own defaults."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    response_format: Json | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[Annotated[str, Field(max_length=1024)]] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    structured_outputs: Json | None = None
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    # ours
    speculation: SpeculationOptions | None = None
    target_tpot_s: float | None = None
    include_metrics: bool = False
    # labels: they change nothing
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SamplingBody):
    """`/v1/completions`."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


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

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Body):
    """What a tool is called, what it is for, and its parameters as a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


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
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TokenizeRequest(Body):
    """`/tokenize`: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    return_token_strs: bool = False


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
