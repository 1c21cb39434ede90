"""What a request's tools mean: for the chat template, for the law, and for reading the answer."""

import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from specinfer.errors import ConfigError, RequestError
from specinfer.request import SamplingParams
from specinfer.serve.callgrammar import ANY_OBJECT, calls_schema, calls_tag, parameters_of
from specinfer.serve.errors import ApiError
from specinfer.serve.schema import ChatRequest, NamedTool, Tool
from specinfer.serve.settings import ToolFormat
from specinfer.serve.toolcalls import CallFormat, ToolCallReader
from specinfer.structured import StructuredOutputsParams
from specinfer.text.tokenizer import Tokenizer

Choice = Literal["none", "auto", "required", "named"]


def detect_format(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls, where the template shows it."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return "llama3_json"
    return None


def tool_template(tokenizer: Tokenizer) -> str:
    """The template that a chat with tools goes through; "" where the model has none."""
    templates = tokenizer.chat_templates
    return templates.get("tool_use") or templates.get("default") or ""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One request's tools.

    tools    those the template is shown
    choice   what the model may do with them
    name     the one it must call, of a named choice
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "none"
    name: str | None = None
    format: ToolFormat | None = None
    is_parallel: bool = True

    @classmethod
    def of(cls, body: ChatRequest, tokenizer: Tokenizer, asked: ToolFormat | None) -> "ToolUse":
        """Read a request.

        asked   the server's --tool-call-parser
        raises  ApiError for what this model or server cannot do
        """
        choice = body.tool_choice
        if not body.tools:
            if choice not in (None, "none"):
                raise ApiError(400, "tool_choice needs tools", param="tool_choice")
            return cls()
        if choice == "none":
            return cls()
        template = tool_template(tokenizer)
        if "tools" not in template:
            raise ApiError(
                400, "the model's chat template knows no tools: leave them out", param="tools"
            )
        name = choice.function.name if isinstance(choice, NamedTool) else None
        if name is not None and name not in [tool.function.name for tool in body.tools]:
            raise ApiError(
                400, f"tool_choice names {name!r}, which is not in tools", param="tool_choice"
            )
        found = asked or detect_format(template)
        kind: Choice = (
            "named" if name is not None else "required" if choice == "required" else "auto"
        )
        if kind == "auto" and found is None:
            raise ApiError(
                400,
                "the model's chat template does not show how it writes tool calls: start the "
                "server with --tool-call-parser, or set tool_choice to the tool to call",
                param="tools",
            )
        return cls(tuple(body.tools), kind, name, found, body.parallel_tool_calls)

    def prompt_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates know them; without parameters a function takes none."""
        shown = [tool.model_dump(exclude_unset=True) for tool in self.tools]
        for each, tool in zip(shown, self.tools, strict=True):
            each["function"].setdefault("parameters", parameters_of(tool))
        return shown or None

    def sampling_fields(self) -> dict[str, Any]:
        """What the choice asks of `SamplingParams`.

        Markers of calls are often special tokens, which have to stay in the text to be found.
        """
        return {"skip_special_tokens": False} if self.choice == "auto" else {}

    @property
    def held_tools(self) -> list[Tool]:
        """Those whose calls are held to their schemas."""
        if self.choice == "auto":
            return [tool for tool in self.tools if tool.function.strict]
        if self.choice == "named":
            return [tool for tool in self.tools if tool.function.name == self.name]
        return list(self.tools)

    def held(self, params: SamplingParams) -> SamplingParams:
        """The same parameters, with calls held to their schemas.

        A call that must come always is, one that may come where a tool is strict. Where the answer
        has a schema, either it comes or calls do.
        raises  ApiError for shapes of the answer that leave no room for calls, and for a schema
                that cannot be kept
        """
        asked = params.structure
        for tool in self.held_tools:
            try:
                StructuredOutputsParams(json=parameters_of(tool))
            except ConfigError as error:
                raise _blaming([tool], error) from None
        if self.choice == "none":
            return params
        if self.choice == "auto":
            return self._held_if_called(params, asked)
        if asked is not None:
            raise ApiError(400, f"{asked.kind} and tool_choice exclude each other: give one")
        if self.choice == "required":
            schema = calls_schema(self.tools, is_parallel=self.is_parallel)
        else:
            tool = self.held_tools[0]
            schema = parameters_of(tool)
        return _shaped(params, StructuredOutputsParams(json=schema))

    def _held_if_called(
        self, params: SamplingParams, asked: StructuredOutputsParams | None
    ) -> SamplingParams:
        strict = [tool.function.name for tool in self.held_tools]
        has_schema = asked is not None and asked.kind in ("json", "json_object")
        if asked is not None and (not has_schema or asked.disable_any_whitespace):
            if not strict:
                return params  # and no call can come
            raise ApiError(
                400,
                f"the function {strict[0]!r} is strict, and its calls can come in place of an "
                "answer with a JSON schema or json_object alone, with any whitespace: leave the "
                'other shape out, or set tool_choice to "none"',
                param="structured_outputs",
            )
        if asked is None and not strict:
            return params
        assert self.format is not None, "`of` refuses tools that may be called in no known format"
        answer = None if asked is None else ANY_OBJECT if asked.json is None else asked.schema
        tag = calls_tag(self.format, self.tools, answer, is_parallel=self.is_parallel)
        return _shaped(params, StructuredOutputsParams(structural_tag=tag))

    async def explained(
        self,
        error: ApiError | RequestError,
        params: SamplingParams,
        prepare: Callable[[SamplingParams], Awaitable[None]],
    ) -> ApiError | RequestError:
        """What is wrong with `held` parameters, in words of the tools where it is with them.

        prepare  compiles what an output must be, or raises RequestError; ApiError where it takes
                 too long
        """
        if not self.held_tools or not _SHAPE.match(str(error)):
            return error
        if isinstance(error, ApiError):  # it took too long: not once more, tool by tool
            return _blaming(self.held_tools, error)
        for tool in self.held_tools:
            try:
                await prepare(_shaped(params, StructuredOutputsParams(json=parameters_of(tool))))
            except RequestError as found:
                return _blaming([tool], found)
            except ApiError:  # this one takes too long; who is to blame is not worth more
                return error
        return error

    def reader(self) -> ToolCallReader | None:
        """What finds the calls in one continuation; None: all of it is text or one call's."""
        names = [tool.function.name for tool in self.tools]
        kind: CallFormat | None = "array" if self.choice == "required" else self.format
        if self.choice not in ("auto", "required") or kind is None:
            return None
        return ToolCallReader(kind, names, is_parallel=self.is_parallel)

    def new_id(self) -> str:
        """A call's id; Mistral's templates take nine letters and digits."""
        return (
            secrets.token_hex(5)[:9]
            if self.format == "mistral"
            else f"call_{secrets.token_hex(12)}"
        )


def _shaped(params: SamplingParams, shape: StructuredOutputsParams) -> SamplingParams:
    return replace(params, structured_outputs=shape, response_format=None)


_SHAPE = re.compile(r"structured_outputs(: |\.)\w+")
"""How errors of shapes begin."""


def _blaming(tools: Sequence[Tool], error: Exception) -> ApiError:
    """An error of the shape that tools made, as one of theirs."""
    names = ", ".join(repr(tool.function.name) for tool in tools)
    whose = f"the parameters of the function{'s' * (len(tools) > 1)} {names}"
    [(colon, problem)] = re.findall(rf"{_SHAPE.pattern} (.*)", str(error), re.DOTALL)
    text = f"{whose}: {problem}" if colon == ": " else f"{whose}: the schema {problem}"
    return ApiError(400, text, code="invalid_value", param="tools")
