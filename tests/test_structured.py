"""What may be asked of an output, and what is refused instead of silently not kept."""

import json
from typing import Any

import pytest

from specinfer.errors import ConfigError
from specinfer.request import SamplingParams
from specinfer.structured import StructuredOutputsParams, is_deeper, read_response_format


def nested(depth: int) -> dict[str, Any]:
    """Arrays of arrays of … strings."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OLDER = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}


def tagged(schema: Any) -> dict[str, Any]:
    """A structural tag of a schema alone."""
    return {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}


def test_the_ways_to_ask_mean_the_same() -> None:
    asked = StructuredOutputsParams(json=SCHEMA)
    assert SamplingParams(structured_outputs=asked).structure == asked
    assert SamplingParams(structured_outputs={"json": SCHEMA}).structure == asked
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert SamplingParams(response_format=response_format).structure == asked
    strict = {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}
    assert read_response_format(strict) == asked
    text = StructuredOutputsParams(json='{"type": "object"}')
    assert text.schema == {"type": "object"}
    assert SamplingParams(response_format={"type": "text"}).structure is None
    of_any = SamplingParams(response_format={"type": "json_object"}).structure
    assert of_any == StructuredOutputsParams(json_object=True)
    assert SamplingParams().structure is None
    tag = StructuredOutputsParams(structural_tag=tagged(SCHEMA))
    assert SamplingParams(response_format=tagged(SCHEMA)).structure == tag
    assert StructuredOutputsParams(structural_tag=json.dumps(tagged(SCHEMA))).tag == tag.tag
    older = {"type": "structural_tag"} | OLDER
    [call] = SamplingParams(response_format=older).structure.tag["format"]["tags"]  # type: ignore[union-attr]
    assert (call["begin"], call["end"], call["content"]) == ("<f>", "</f>", tag.tag["format"])
    mixed = SamplingParams(response_format={"type": "text"}, structured_outputs={"regex": "a"})
    assert mixed.structure == StructuredOutputsParams(regex="a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "has nothing: give exactly one of json, regex"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({"json_object": False}, "has nothing"),
        ({"regex": 5}, "regex=5 must be a string"),
        ({"choice": []}, "choice=.. must be a list of strings"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "ab"}, "must be a list"),
        ({"json_object": 1}, "json_object=1 must be true or false"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": 3}, "schema must be an object"),
        ({"json": {"type": "array", "uniqueItems": True}}, "schema has 'uniqueItems', which"),
        (
            {"json": {"properties": {"a": {"items": {"not": {}}}}}},
            "properties.a.items has 'not', which cannot be kept",
        ),
        ({"json": {"allOf": [{}, {}]}}, "allOf of several"),
        ({"json": {"allOf": 5}}, "allOf=5, which must be a list"),
        ({"json": nested(950)}, "nested more than 64 deep"),
        ({"json": "[" * 100_000}, "no JSON"),
        ({"json": {"$defs": {"x": {"pattern": "a", "maxLength": 3}}}}, "defs.x has a pattern and"),
        ({"structural_tag": "{"}, "structural_tag is no JSON"),
        ({"structural_tag": {"type": "structural_tag"}}, "structural_tag must be {"),
        ({"structural_tag": OLDER | {"triggers": []}}, "structural_tag must be {"),
        ({"structural_tag": OLDER | {"structures": [{"begin": "x"}]}}, "structural_tag must be {"),
        ({"structural_tag": tagged(nested(99))}, "structural_tag is nested more than 64 deep"),
        ({"structural_tag": tagged({"not": {}})}, "json_schema schema has 'not', which"),
        ({"structural_tag": tagged({}), "disable_any_whitespace": True}, "cannot keep disable_any"),
        ({"gramar": "x"}, "has no 'gramar': known are json, regex"),
    ],
)
def test_what_could_not_be_kept_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(structured_outputs=fields)
    assert words.replace("..", "[]") in str(caught.value)


def test_depth_has_an_end() -> None:
    assert StructuredOutputsParams(json=nested(60)).kind == "json"
    assert is_deeper([[[]]], 2)
    assert not is_deeper([[[]]], 3)
    assert not is_deeper({"a": [1, "text"]}, 2)


def test_names_of_properties_are_no_keywords() -> None:
    properties = {"not": {"type": "integer"}, "contains": {"type": "boolean"}}
    StructuredOutputsParams(json={"type": "object", "properties": properties})


@pytest.mark.parametrize(
    "asked",
    [
        "json",
        {"type": "yaml"},
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": "x"}},
    ],
)
def test_bad_response_formats_are_refused(asked: Any) -> None:
    with pytest.raises(ConfigError, match="response_format"):
        SamplingParams(response_format=asked)


def test_a_schema_that_cannot_be_kept_is_refused_by_the_field_that_has_it() -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
    with pytest.raises(ConfigError, match=r"^response_format: json schema has 'not'"):
        SamplingParams(response_format=asked)


def test_two_shapes_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="response_format and structured_outputs"):
        SamplingParams(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"temperature": 1e40},
        {"target_tpot_s": 1e-300},
        {"logit_bias": {17: 1e39}},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": "1"},
        {"logit_bias": {"17": 1.0}},
        {"logit_bias": {17: float("-inf")}},
        {"logit_bias": [1]},
        {"bad_words": "ab"},
        {"bad_words": [""]},
        {"bad_words": [3]},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": 5},
        {"logprobs": -2},
        {"logprobs": True},
        {"prompt_logprobs": 1.5},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**fields)
