"""What a request's tools mean: for the chat template, for the law, and for reading the answer."""

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from specinfer.serve.errors import ApiError
from specinfer.serve.schema import ChatRequest, NamedTool, Tool
from specinfer.serve.settings import ToolFormat
from specinfer.serve.toolcalls import CallFormat, ToolCallReader
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
        strict = [tool.function.name for tool in body.tools if tool.function.strict]
        if kind == "auto" and strict:
            raise ApiError(
                400,
                f"the function {strict[0]!r} is strict, and only calls that must come are held to "
                'their schema: leave strict out, or set tool_choice to "required" or the tool',
                param="tools",
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
            each["function"].setdefault("parameters", _parameters(tool))
        return shown or None

    def sampling_fields(self) -> dict[str, Any]:
        """What the choice asks of `SamplingParams`.

        A call that must come is held to its schema. Markers of calls are often special tokens,
        which have to stay in the text to be found.
        """
        if self.choice == "named":
            schema = next(
                _parameters(tool) for tool in self.tools if tool.function.name == self.name
            )
            return {"structured_outputs": {"json": schema}}
        if self.choice == "required":
            return {"structured_outputs": {"json": self._calls_schema()}}
        return {"skip_special_tokens": False} if self.choice == "auto" else {}

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

    def _calls_schema(self) -> dict[str, Any]:
        """A list of calls. Parameters stand where their own references still lead somewhere."""
        places = [f"parameters_{index}" for index in range(len(self.tools))]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool.function.name]},
                    "parameters": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool, place in zip(self.tools, places, strict=True)
        ]
        defined = {
            place: _moved(_parameters(tool), f"#/$defs/{place}")
            for tool, place in zip(self.tools, places, strict=True)
        }
        most = {} if self.is_parallel else {"maxItems": 1}
        items = {"anyOf": calls}
        return {"type": "array", "minItems": 1, **most, "items": items, "$defs": defined}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself lead to where it stands now."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(inner, root) for name, inner in schema.items()}
    if isinstance(to := schema.get("$ref"), str) and to.startswith("#"):
        moved["$ref"] = root + to[1:]
    return moved


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}
