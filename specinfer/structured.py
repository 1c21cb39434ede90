"""What an output must be shaped like: vLLM's `StructuredOutputsParams`, OpenAI's response_format.

Both become one value; specinfer/grammar.py makes a grammar of it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from specinfer.errors import ConfigError

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

_NOT_ENFORCED = (
    *("uniqueItems", "contains", "not", "if", "dependentRequired", "dependentSchemas"),
    *("unevaluatedProperties", "unevaluatedItems"),
)
"""JSON Schema's words that no context-free grammar of a schema keeps."""

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")

MAX_DEPTH = 64
"""Objects and lists within one another: what walks a schema does so by recursion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must be; exactly one of the first six.

    json                    a JSON schema, as an object or its text; properties come in its order,
                            and none that it does not name
    regex                   a regular expression that the whole output matches
    choice                  one of these texts
    grammar                 a grammar in EBNF (GBNF, with a rule `root ::= …`) or Lark's (`start:`)
    json_object             any JSON object
    structural_tag          xgrammar's, as an object or its text: {"type": "structural_tag",
                            "format": …}, or vLLM's older {"structures": …, "triggers": …}. Text
                            that is free up to a trigger, say. Special tokens that end no text may
                            come, as what they stand for: skip_special_tokens leaves them out
    disable_any_whitespace  JSON on one line, with ", " and ": " as separators; else whitespace may
                            stand between any two of its parts, up to 10 characters

    oneOf is anyOf here. raises ConfigError for anything that could not be kept
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}: "
                f"give exactly one of {', '.join(_KINDS)}"
            )
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise _bad(f"{name}={getattr(self, name)!r} must be a string")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise _bad(f"{name}={getattr(self, name)!r} must be true or false")
        if self.choice is not None and not _are_texts(self.choice):
            raise _bad(f"choice={self.choice!r} must be a list of strings, none of them empty")
        if self.json is not None:
            if is_deeper(self.schema, MAX_DEPTH):
                raise _bad(f"json is nested more than {MAX_DEPTH} deep: make it flatter")
            for problem in _problems(self.schema):
                raise _bad(f"json {problem}")
        if self.structural_tag is not None:
            self._check_tag()

    @property
    def kind(self) -> str:
        """Which of the six it is."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @property
    def schema(self) -> Any:
        """`json` as an object.

        raises  ConfigError if it is a text that is no JSON
        """
        return _parsed("json", self.json)

    @property
    def tag(self) -> dict[str, Any]:
        """`structural_tag` as an object in xgrammar's present spelling.

        raises  ConfigError if it is a text that is no JSON, or has neither spelling
        """
        tag = _parsed("structural_tag", self.structural_tag)
        is_tag = isinstance(tag, Mapping) and tag.get("type", "structural_tag") == "structural_tag"
        if is_tag and isinstance(tag.get("format"), Mapping):
            return {"type": "structural_tag", "format": tag["format"]}
        if is_tag and _are_structures(tag.get("structures")) and _are_texts(tag.get("triggers")):
            return {"type": "structural_tag", "format": _triggered(tag)}
        raise _bad(
            'structural_tag must be {"type": "structural_tag", "format": {…}} or {"structures": '
            '[{"begin": …, "schema": {…}, "end": …}, …], "triggers": […]}'
        )

    def _check_tag(self) -> None:
        tag = self.tag
        if is_deeper(tag, MAX_DEPTH):
            raise _bad(f"structural_tag is nested more than {MAX_DEPTH} deep: make it flatter")
        if self.disable_any_whitespace:
            raise _bad("structural_tag cannot keep disable_any_whitespace: leave it out")
        for schema in _schemas_in(tag["format"]):
            for problem in _problems(schema) if schema is not True else ():
                raise _bad(f"structural_tag's json_schema {problem}")


def read_structured_outputs(options: Any) -> StructuredOutputsParams:
    """`StructuredOutputsParams` from itself or its fields' names and values.

    raises  ConfigError for a name it does not have
    """
    if isinstance(options, StructuredOutputsParams):
        return options
    known = [each.name for each in fields(StructuredOutputsParams)]
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"structured_outputs={options!r} must be StructuredOutputsParams or its fields, such "
            'as {"regex": "[0-9]+"}'
        )
    for name in options:
        if name not in known:
            raise _bad(f"has no {name!r}: known are {', '.join(known)}")
    return StructuredOutputsParams(**options)


def read_response_format(asked: Any) -> StructuredOutputsParams | None:
    """OpenAI's response_format, and vLLM's structural tags; None: any text.

    A schema is kept whatever its "strict" says.
    raises  ConfigError for what OpenAI's API does not know, or cannot be kept
    """
    try:
        return _read_response_format(asked)
    except ConfigError as error:
        text = str(error).replace("structured_outputs: ", "response_format: ", 1)
        raise ConfigError(text) from None


def _read_response_format(asked: Any) -> StructuredOutputsParams | None:
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=asked)
    if kind != "json_schema":
        raise ConfigError(
            f'response_format={asked!r} must be {{"type": "text"}}, {{"type": "json_object"}}, '
            '{"type": "json_schema", "json_schema": {"name": …, "schema": …}} or '
            '{"type": "structural_tag", "format": {…}}'
        )
    inner = asked.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError('response_format of type "json_schema" needs json_schema.schema')
    return StructuredOutputsParams(json=schema)


def is_deeper(value: Any, most: int) -> bool:
    """Whether more objects and lists than that stand within one another."""
    level = [value]
    for _ in range(most + 1):
        outer = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not outer:
            return False
        inner = (each.values() if isinstance(each, Mapping) else each for each in outer)
        level = [each for values in inner for each in values]
    return True


def _bad(problem: str) -> ConfigError:
    return ConfigError(f"structured_outputs: {problem}")


def _are_texts(values: Any) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and bool(values) and all(isinstance(each, str) and each for each in values)


def _parsed(name: str, value: Any) -> Any:
    """What may be given as text, as an object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{name} is no JSON: {error}") from None


def _are_structures(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(each, Mapping) and each.keys() == {"begin", "schema", "end"} for each in values
    )


def _triggered(tag: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's older spelling in the present one."""
    tags = [
        {
            "type": "tag",
            "begin": each["begin"],
            "content": {"type": "json_schema", "json_schema": each["schema"]},
            "end": each["end"],
        }
        for each in tag["structures"]
    ]
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


def _schemas_in(tag: Any) -> Iterator[Any]:
    """The JSON schemas in a structural tag."""
    if isinstance(tag, Mapping):
        for name, inner in tag.items():
            if name == "json_schema":
                yield inner
            else:
                yield from _schemas_in(inner)
    elif isinstance(tag, list | tuple):
        for inner in tag:
            yield from _schemas_in(inner)


def _problems(schema: Any, where: str = "") -> Iterator[str]:
    """What of a schema would silently not be kept, or is none."""
    if not isinstance(schema, Mapping):
        if not isinstance(schema, bool) or not where:
            yield f"{where or 'schema'} must be an object"
        return
    here = where or "schema"
    for word in _NOT_ENFORCED:
        if word in schema:
            yield f"{here} has {word!r}, which cannot be kept while writing: leave it out"
    for word in _OF_SCHEMAS:
        if not isinstance(schema.get(word, []), list | tuple):
            yield f"{here} has {word}={schema[word]!r}, which must be a list of schemas"
    if len(schema.get("allOf", ())) > 1:
        yield f"{here} has an allOf of several schemas: merge them into one"
    if "pattern" in schema and schema.keys() & {"minLength", "maxLength"}:
        yield f"{here} has a pattern and a length: put the length into the pattern"
    for word in _OF_NAMES:
        if isinstance(schema.get(word), Mapping):
            for name, inner in schema[word].items():
                yield from _problems(inner, f"{where}.{word}.{name}".lstrip("."))
    for word in _OF_SCHEMAS:
        for inner in schema.get(word, ()):
            yield from _problems(inner, f"{where}.{word}".lstrip("."))
    for word in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(word), Mapping):
            yield from _problems(schema[word], f"{where}.{word}".lstrip("."))
