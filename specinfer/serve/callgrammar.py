"""What tools let a model write: calls by their schemas, and any text before one begins.

A call begins with whatever `ToolCallReader` takes for its beginning, so that it reads none that was
not held to its schema:

    hermes       <tool_call>, anywhere
    mistral      [TOOL_CALLS], anywhere
    llama3_json  { or <|python_tag|>, where the text begins with it; nothing but calls follows
"""

import re
from collections.abc import Sequence
from typing import Any

from specinfer.serve.schema import Tool
from specinfer.serve.settings import ToolFormat

Json = dict[str, Any]

_SPACE = {"type": "regex", "pattern": r"[ \t\r\n]{0,10}"}
ANY_OBJECT = {"type": "object", "additionalProperties": True}
_PYTHON_TAG = "<|python_tag|>"


def parameters_of(tool: Tool) -> Json:
    """A tool's schema; without parameters a function takes none."""
    return tool.function.parameters or {"type": "object", "properties": {}}


def calls_schema(tools: Sequence[Tool], *, is_parallel: bool) -> Json:
    """A list of calls that must come."""
    return _list_of(
        _one_of(tools, [parameters_of(tool) for tool in tools], "parameters"), is_parallel
    )


def calls_tag(kind: ToolFormat, tools: Sequence[Tool], answer: Any, *, is_parallel: bool) -> Json:
    """Calls that may come, as a structural tag.

    Arguments follow the schema of a strict tool, and are any object of another.
    answer  the JSON schema of what is no call; None: any text
    """
    schemas = [parameters_of(tool) if tool.function.strict else ANY_OBJECT for tool in tools]
    if kind == "llama3_json":
        inner = _llama(_json(_one_of(tools, schemas, "parameters")), answer, is_parallel)
    else:
        one = _one_of(tools, schemas, "arguments")
        tag = _hermes(one) if kind == "hermes" else _mistral(tools, schemas, one, is_parallel)
        inner = _marked(tag, answer, is_parallel)
    return {"type": "structural_tag", "format": inner}


# --- formats --------------------------------------------------------------------------------------


def _hermes(one: Json) -> Json:
    content = _sequence(_SPACE, _json(one), _SPACE)
    return {"type": "tag", "begin": "<tool_call>", "content": content, "end": "</tool_call>"}


def _mistral(tools: Sequence[Tool], schemas: list[Any], one: Json, is_parallel: bool) -> Json:
    """A list of calls, or one in the newer form: a name, perhaps an id, and the arguments."""
    call_id = _sequence(_text("[CALL_ID]"), {"type": "regex", "pattern": "[a-zA-Z0-9]{9}"})
    marks = _sequence(_optional(call_id), _optional(_text("[ARGS]")), _SPACE)
    named = [
        _sequence(_text(tool.function.name), marks, _json(schema))
        for tool, schema in zip(tools, schemas, strict=True)
    ]
    content = _sequence(_SPACE, _either(_json(_list_of(one, is_parallel)), *named))
    return {"type": "tag", "begin": "[TOOL_CALLS]", "content": content, "end": ""}


def _marked(tag: Json, answer: Any, is_parallel: bool) -> Json:
    """Calls that a marker tells from text, or that come instead of the answer."""
    if answer is not None:
        call = _sequence(tag, _SPACE)
        calls = {"type": "plus", "content": call} if is_parallel else call
        return _either(_json(answer), _sequence(_SPACE, calls))
    return {
        "type": "triggered_tags",
        "triggers": [tag["begin"]],
        "tags": [tag],
        "stop_after_first": not is_parallel,
    }


def _llama(call: Json, answer: Any, is_parallel: bool) -> Json:
    """Calls, separated by semicolons, or a text that does not begin like one."""
    next_call = _sequence({"type": "regex", "pattern": "[;,]"}, _SPACE, call, _SPACE)
    further = [{"type": "star", "content": next_call}] if is_parallel else []
    tagged = _optional(_sequence(_text(_PYTHON_TAG), _SPACE))
    calls = _sequence(tagged, call, _SPACE, *further)
    if answer is not None:
        return _either(_json(answer), _sequence(_SPACE, calls))
    parts = [(_PYTHON_TAG[:end], _PYTHON_TAG[end]) for end in range(1, len(_PYTHON_TAG))]
    begun = "|".join(f"{re.escape(part)}[^{re.escape(other)}]" for part, other in parts)
    whole = "|".join(re.escape(part) for part, _ in parts)
    text = _sequence(
        {"type": "regex", "pattern": rf"[^{{{_PYTHON_TAG[0]} \t\r\n]|{begun}"}, {"type": "any_text"}
    )
    short = {"type": "regex", "pattern": f"({whole})?"}
    return _sequence({"type": "regex", "pattern": r"[ \t\r\n]*"}, _either(calls, text, short))


# --- parts of them --------------------------------------------------------------------------------


def _json(schema: Any) -> Json:
    return {"type": "json_schema", "json_schema": schema}


def _text(value: str) -> Json:
    return {"type": "const_string", "value": value}


def _sequence(*parts: Json) -> Json:
    return {"type": "sequence", "elements": [*parts]}


def _either(*parts: Json) -> Json:
    return {"type": "or", "elements": [*parts]}


def _optional(part: Json) -> Json:
    return {"type": "optional", "content": part}


# --- schemas --------------------------------------------------------------------------------------


def _one_of(tools: Sequence[Tool], schemas: Sequence[Any], key: str) -> Json:
    """Any one call. Parameters stand where their own references still lead somewhere."""
    places = [f"parameters_{index}" for index in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                key: {"$ref": f"#/$defs/{place}"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    defined = {
        place: _moved(schema, f"#/$defs/{place}")
        for place, schema in zip(places, schemas, strict=True)
    }
    return {"anyOf": calls, "$defs": defined}


def _list_of(one: Json, is_parallel: bool) -> Json:
    most = {} if is_parallel else {"maxItems": 1}
    items = {"anyOf": one["anyOf"]}
    return {"type": "array", "minItems": 1, **most, "items": items, "$defs": one["$defs"]}


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
