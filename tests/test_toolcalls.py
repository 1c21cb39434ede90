"""Tool calls read out of text: three formats, any cuts, and nothing lost where there is no call."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.serve.toolcalls import CallFormat, ToolCallReader

NAMES = ("get_weather", "add")
ARGUMENTS = '{"city": "Zü\\"rich\\\\", "days": [1, {"x": null}]}'
Read = tuple[str, list[tuple[str, str]]]


def read(kind: CallFormat, pieces: list[str], **options: Any) -> Read:
    """The text, and (name, arguments) of each call."""
    reader = ToolCallReader(kind, NAMES, **options)
    text, calls = "", []
    for delta in [d for piece in pieces for d in reader.push(piece)] + reader.flush():
        if delta.call is None:
            text += delta.text
            continue
        if delta.name is not None:
            assert delta.call == len(calls)
            calls.append((delta.name, ""))
        calls[delta.call] = (calls[delta.call][0], calls[delta.call][1] + delta.arguments)
    assert reader.num_calls == len(calls) or not options.get("is_parallel", True)
    return text, calls


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ONE = ("get_weather", ARGUMENTS)
TWO = ("add", '{"a": 1}')
CASES: list[tuple[CallFormat, str, Read]] = [
    ("hermes", "Just text, 1 < 2 and <tool_ call>", ("Just text, 1 < 2 and <tool_ call>", [])),
    ("hermes", hermes(*ONE), ("", [ONE])),
    ("hermes", f"Let me look.\n{hermes(*ONE)}\n{hermes(*TWO)}\n", ("Let me look.", [ONE, TWO])),
    ("hermes", f"{hermes(*ONE)}\nDone", ("\nDone", [ONE])),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ("", [TWO])),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', ("", [("add", "{}")])),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", [TWO]),
    ),
    ("hermes", "a <tool_call>nothing</tool_call>", ("a <tool_call>nothing</tool_call>", [])),
    ("hermes", '<tool_call>{"name": 3, ', ('<tool_call>{"name": 3, ', [])),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', ("", [("add", '{"a": 1')])),
    ("hermes", "  text  ", ("  text  ", [])),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ("", [ONE])),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {ARGUMENTS}}};'
        ' {"name": "add", "parameters": {"a": 1}}',
        ("", [ONE, TWO]),
    ),
    ("llama3_json", '{"name": "Tim", "age": 3}', ('{"name": "Tim", "age": 3}', [])),
    ("llama3_json", ' \n{"a": [1, 2]} and more', (' \n{"a": [1, 2]} and more', [])),
    ("llama3_json", "{", ("{", [])),
    ("llama3_json", "", ("", [])),
    ("llama3_json", "No.", ("No.", [])),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}, '
        '{"name": "add", "arguments": {"a": 1}}]',
        ("", [ONE, TWO]),
    ),
    ("mistral", f"Sure.[TOOL_CALLS]get_weather{ARGUMENTS}", ("Sure.", [ONE])),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{ARGUMENTS}", ("", [ONE])),
    (
        "mistral",
        f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]add[ARGS]" + '{"a": 1}',
        ("", [ONE, TWO]),
    ),
    ("mistral", "[TOOL_CALLS] nothing", ("[TOOL_CALLS] nothing", [])),
    ("array", f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}]', ("", [ONE])),
    ("array", "text", ("text", [])),
]


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_what_is_a_call_and_what_is_text(kind: CallFormat, text: str, expected: Read) -> None:
    assert read(kind, [text]) == expected
    assert read(kind, list(text)) == expected


@pytest.mark.parametrize("kind", ["hermes", "llama3_json", "mistral", "array"])
@given(data=st.data())
@settings(max_examples=150)
def test_cuts_change_nothing(kind: CallFormat, data: st.DataObject) -> None:
    words = [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ";", " "),
        *('{"name": "add", ', '"arguments": ', '"parameters": ', '{"a": [1, "}"]}', "}", "[", "]"),
        *("text", "add", ",", '"', "\\", "\n", "<tool", "[TOOL"),
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=14)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(kind, pieces) == read(kind, [text])


@given(st.text(max_size=60))
@settings(max_examples=150)
def test_text_without_markers_is_kept_whole(text: str) -> None:
    kinds: tuple[CallFormat, ...] = ("hermes", "llama3_json", "mistral", "array")
    for kind in kinds:
        assert read(kind, [text]) == (text, [])


def test_arguments_come_while_they_are_written() -> None:
    reader = ToolCallReader("hermes", NAMES)
    told = [
        reader.push(piece) for piece in ('<tool_call>{"name": "add", "arg', 'uments": {"a"', ": 1")
    ]
    assert [delta.name for delta in told[1]] == ["add", None]
    assert [delta.arguments for delta in told[1] + told[2]] == ["", '{"a"', ": 1"]


def test_only_the_first_where_calls_are_not_parallel() -> None:
    text = hermes(*ONE) + hermes(*TWO)
    assert read("hermes", [text], is_parallel=False) == ("", [ONE])


def test_arguments_that_were_read_are_json() -> None:
    _, [(_, arguments)] = read("hermes", [hermes(*ONE)])
    assert json.loads(arguments)["city"] == 'Zü"rich\\'
