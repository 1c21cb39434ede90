"""What tools let a model write, against what reads it: no call is read that its schema refuses."""

import json
from typing import Any, get_args

import numpy as np
import pytest

from specinfer.grammar import GrammarCompiler, PathMatcher
from specinfer.serve.callgrammar import calls_schema, calls_tag
from specinfer.serve.schema import Function, Tool
from specinfer.serve.settings import ToolFormat
from specinfer.serve.toolcalls import ToolCallReader
from specinfer.structured import StructuredOutputsParams

pytest.importorskip("xgrammar")

END = 256
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"]
LONGER = [
    *MARKERS,
    *('{"name": "visit', '", "arguments": {', '", "parameters": {', "Bern", "Oslo", '"city": "'),
    *('"any": [', "visit", "wander", "; ", "<tool", "_call>\n", "all</tool_call><tool_", "[TOOL"),
]
PIECES = [bytes([byte]) for byte in range(256)] + [b""] + [text.encode() for text in LONGER]

LIKED = [set(b'{}[]":,') | {END}, set(range(END, len(PIECES)))]
"""What ends a call, and what begins one."""

CITY = {"$defs": {"City": {"enum": ["Bern", "Rome"]}}, "type": "object"}
VISIT = CITY | {
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(type="function", function=Function(name="visit", parameters=VISIT, strict=True)),
    Tool(type="function", function=Function(name="wander", parameters=VISIT)),
]
FORMATS = get_args(ToolFormat)
ANSWER = {"type": "object", "properties": {"said": {"type": "boolean"}}, "required": ["said"]}
ONE = {
    "hermes": '<tool_call>\n{"name": "visit", "arguments": {"city": "Bern"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "visit", "arguments": {"city": "Bern"}}]',
    "llama3_json": '{"name": "visit", "parameters": {"city": "Bern"}}',
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(PIECES, [END], lambda text: list(text.encode()))


def matcher(
    compiler: GrammarCompiler, kind: ToolFormat, answer: Any = None, *, is_parallel: bool = True
) -> PathMatcher:
    tag = calls_tag(kind, TOOLS, answer, is_parallel=is_parallel)
    return compiler.matcher(StructuredOutputsParams(structural_tag=tag))


def allowed(own: PathMatcher) -> list[int]:
    bits = own.allowed(())
    assert bits is not None
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(PIECES)]).tolist()


def taken(own: PathMatcher, text: str) -> tuple[str, bool]:
    """How much of a text may be written, byte by byte, and whether it may end there."""
    for place, byte in enumerate(text.encode()):
        if byte not in allowed(own):
            return text.encode()[:place].decode(), False
        own.advance([byte])
    return text, END in allowed(own)


def calls(kind: ToolFormat, text: str) -> list[tuple[str, str]]:
    """The calls read in a text: names and arguments."""
    reader, found = ToolCallReader(kind, ["visit", "wander"]), []
    for delta in reader.push(text) + reader.flush():
        if delta.name is not None:
            found.append((delta.name, ""))
        if delta.call is not None:
            found[-1] = (found[-1][0], found[-1][1] + delta.arguments)
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_no_call_is_read_that_its_schema_refuses(
    compiler: GrammarCompiler, kind: ToolFormat
) -> None:
    """Random texts by the masks alone, with a liking for what calls are made of."""
    num_strict = num_loose = 0
    for seed in range(80):
        rng, own, output = np.random.default_rng(seed), matcher(compiler, kind), list[int]()
        token = -1
        while token != END and len(output) < 80:
            tokens = allowed(own)
            liked = set(tokens) & LIKED[rng.integers(2)]
            token = int(rng.choice(sorted(liked) if liked and rng.random() < 0.9 else tokens))
            output.append(token)
            own.advance([token])
        text = b"".join(PIECES[token] for token in output).decode("utf-8", "replace")
        *whole, last = calls(kind, text) or [("", "")]
        if token == END and last[0]:
            whole.append(last)
        for name, arguments in whole:
            value = json.loads(arguments)
            if name == "visit":
                assert value in ({"city": "Bern"}, {"city": "Rome"}), text
                num_strict += 1
            else:
                assert (name, type(value)) == ("wander", dict), text
                num_loose += 1
    assert num_strict > 5
    assert num_loose > 0


@pytest.mark.parametrize("kind", FORMATS)
def test_calls_as_models_write_them(compiler: GrammarCompiler, kind: ToolFormat) -> None:
    one = ONE[kind]
    assert taken(matcher(compiler, kind), one) == (one, True)
    assert calls(kind, one) == [("visit", '{"city": "Bern"}')]
    assert taken(matcher(compiler, kind), one.replace("Bern", "Bonn"))[0].endswith('"B')
    assert taken(matcher(compiler, kind), one.replace("visit", "wisit"))[0].endswith('"w')
    several = {"mistral": one[:-1] + ", " + one[13:], "llama3_json": f"{one}; {one}"}
    two = several.get(kind, f"{one}\n{one}")
    assert taken(matcher(compiler, kind), two) == (two, True)
    assert len(calls(kind, two)) == 2
    only_one = matcher(compiler, kind, is_parallel=False)
    assert len(taken(only_one, two)[0]) < len(one) + 2
    loose = one.replace("visit", "wander").replace('"Bern"', "[1, {}]")
    assert taken(matcher(compiler, kind), loose) == (loose, True)


def test_the_newer_calls_of_mistral(compiler: GrammarCompiler) -> None:
    for marks in ("", "[ARGS]", "[CALL_ID]abc123XYZ[ARGS]"):
        text = (
            f'Well. [TOOL_CALLS]visit{marks}{{"city": "Rome"}}[TOOL_CALLS]wander{marks}{{"x": 1}}'
        )
        assert taken(matcher(compiler, "mistral"), text) == (text, True)
        assert calls("mistral", text) == [("visit", '{"city": "Rome"}'), ("wander", '{"x": 1}')]


def test_the_python_tag_begins_calls(compiler: GrammarCompiler) -> None:
    text = "\n<|python_tag|>" + ONE["llama3_json"]
    assert taken(matcher(compiler, "llama3_json"), text) == (text, True)
    assert len(calls("llama3_json", text)) == 1


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("hermes", ["", "a <tool", '{"name": "visit"}', "<tool_calls>", "é\n\n"]),
        ("mistral", ["", "[TOOL", '[{"name": "visit"}]', "é"]),
        (
            "llama3_json",
            ["", " \n", "<", "<|", "<b>é</b>", "<|python", 'See {"name": "visit"} <|python_tag|>'],
        ),
    ],
)
def test_other_text_is_free(compiler: GrammarCompiler, kind: ToolFormat, texts: list[str]) -> None:
    for text in texts:
        assert taken(matcher(compiler, kind), text) == (text, True)
        assert calls(kind, text) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_an_answer_or_calls(compiler: GrammarCompiler, kind: ToolFormat) -> None:
    for text in ('{"said": true}', ONE[kind]):
        assert taken(matcher(compiler, kind, ANSWER), text) == (text, True)
    assert taken(matcher(compiler, kind, ANSWER), "Well")[0] == ""
    assert not taken(matcher(compiler, kind, ANSWER), '{"said": true} ' + ONE[kind])[1]


def test_calls_that_must_come_are_a_list() -> None:
    schema = calls_schema(TOOLS, is_parallel=False)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert schema["$defs"]["parameters_0"]["properties"]["city"] == {
        "$ref": "#/$defs/parameters_0/$defs/City"
    }
