"""Tools, log-probabilities and prompts over a model that says what the test says."""

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel

from specinfer.async_llm import AsyncLLM
from specinfer.serve.tools import detect_format
from specinfer.structured import StructuredOutputsParams
from tests.serving import MODEL, Scripted, entry, post, service_of, serving, until

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}[{{ tool.function.name }}: "
    "{{ tool.function.parameters | tojson }}]{% endfor %} Write <tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Bern?"}]
CALL = [
    "Let me see.\n<tool",
    '_call>{"name": "get_weather", "argu',
    'ments": {"city"',
    ': "Bern"}}',
    "</tool_call>",
]


@pytest.fixture(scope="module")
def llm(parley: AsyncLLM) -> Scripted:
    return Scripted(parley, TEMPLATE)


@pytest.fixture
def real(parley: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> AsyncLLM:
    """The pair with a template that knows tools, as the model does not."""
    monkeypatch.setattr(parley.tokenizer, "chat_templates", {"default": TEMPLATE})
    monkeypatch.setattr(parley.tokenizer, "_compiled", {})
    return parley


@pytest.fixture(scope="module")
def url(llm: Scripted) -> Iterator[str]:
    with serving(service_of(llm)) as url:
        yield url


@pytest.fixture(autouse=True)
def fresh(llm: Scripted) -> Iterator[None]:
    yield
    llm.pieces, llm.logprobs, llm.prompt_logprobs = ("Hello", " there"), None, None
    llm.finish_reason = "stop"
    llm.asked.clear()


# --- tools ----------------------------------------------------------------------------------------


def test_a_call_and_its_result(client: OpenAI, llm: Scripted) -> None:
    llm.pieces = CALL
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
    assert llm.prompt.startswith('[get_weather: {"type": "object"')
    assert llm.asked[-1][1].skip_special_tokens is False
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Bern"},
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    llm.pieces = ("It is sunny.",)
    again = client.chat.completions.create(
        model=MODEL,
        messages=[*ASK, choice.message.model_dump(), result],
        tools=[WEATHER],
    )
    assert again.choices[0].message.content == "It is sunny."
    assert again.choices[0].message.tool_calls is None
    assert "get_weather(Bern)" in llm.prompt
    assert "<tool>Sunny" in llm.prompt


def test_a_streamed_call(client: OpenAI, llm: Scripted) -> None:
    llm.pieces = CALL
    text, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=[WEATHER],
        stream=True,
    ):
        [choice] = chunk.choices
        text += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reasons.append(choice.finish_reason)
    assert text == "Let me see."
    assert reasons[-1] == "tool_calls"
    assert calls[0].id
    assert calls[0].function is not None
    assert calls[0].function.name == "get_weather"
    fragments = [call.function.arguments for call in calls if call.function]
    assert len(fragments) > 2, "they come while they are written"
    assert json.loads("".join(filter(None, fragments))) == {"city": "Bern"}
    assert {call.index for call in calls} == {0}


def test_langchain_binds_tools(url: str, llm: Scripted) -> None:
    llm.pieces = CALL
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=MODEL).bind_tools([WEATHER])
    [call] = chat.invoke("How is the weather in Bern?").tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Bern"})


def test_tools_that_may_not_be_called_are_not_shown(url: str, llm: Scripted) -> None:
    llm.pieces = CALL
    body = {"messages": ASK, "tools": [WEATHER], "tool_choice": "none"}
    message = post(url, "/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == "".join(CALL)
    assert "tool_calls" not in message
    assert "get_weather" not in llm.prompt


def test_a_call_cut_short_is_told_as_far_as_it_came(url: str, llm: Scripted) -> None:
    llm.pieces, llm.finish_reason = CALL[:3], "length"
    [choice] = post(url, "/v1/chat/completions", {"messages": ASK, "tools": [WEATHER]}).json()[
        "choices"
    ]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city"'


def test_arguments_that_are_no_json_are_refused(url: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = post(url, "/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400
    assert "arguments" in answer.json()["error"]["message"]


def test_a_call_that_must_come_is_held_to_its_schema(real: AsyncLLM) -> None:
    """The bundled model knows no tools: it calls one because it can say nothing else."""
    city = {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}},
        "required": ["city"],
    }
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": city}}
    add = {"type": "function", "function": {"name": "add"}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    with serving(service_of(real)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for choice, reason in (("required", "tool_calls"), (named, "stop")):
            asked: dict[str, Any] = {
                "model": MODEL,
                "messages": ASK,
                "tools": [weather, add],
                "tool_choice": choice,
                "parallel_tool_calls": False,
                "temperature": 1.0,
                "seed": 3,
                "max_tokens": 60,
            }
            told = client.chat.completions.create(**asked).choices[0]
            assert told.finish_reason == reason
            assert not told.message.content
            [call] = told.message.tool_calls
            if choice == named or call.function.name == "get_weather":
                assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
            deltas = [
                each
                for chunk in client.chat.completions.create(**asked, stream=True)
                for each in chunk.choices[0].delta.tool_calls or []
            ]
            assert deltas[0].function.name == call.function.name
            arguments = "".join(each.function.arguments for each in deltas)
            assert arguments == call.function.arguments


def test_calls_with_definitions_of_their_own(
    real: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pydantic writes: both tools define a City, one of them refers to itself."""
    short = TEMPLATE.replace("{{ tool.function.parameters | tojson }}", "")
    monkeypatch.setattr(real.tokenizer, "chat_templates", {"default": short})
    tools = []
    for name, word in (("visit", "$defs"), ("leave", "definitions")):
        parameters = {
            word: {"City": {"enum": [f"{name} Bern", f"{name} Rome"]}},
            "type": "object",
            "properties": {"city": {"$ref": f"#/{word}/City"}},
            "required": ["city"],
        }
        if name == "leave":
            parameters["properties"]["then"] = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
        tools.append({"type": "function", "function": {"name": name, "parameters": parameters}})
    with serving(service_of(real)) as url:
        asked = {"messages": ASK, "tool_choice": "required", "max_tokens": 150, "seed": 1}
        for tool in tools:
            name = tool["function"]["name"]
            answer = post(url, "/v1/chat/completions", asked | {"tools": [tool]})
            assert answer.status_code == 200, answer.text
            call = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
            assert call["name"] == name
            assert json.loads(call["arguments"])["city"] in (f"{name} Bern", f"{name} Rome")
        assert post(url, "/v1/chat/completions", asked | {"tools": tools}).status_code == 200


class GetWeather(BaseModel):
    """The weather."""

    city: Literal["Bern", "Rome"]


STRICT = openai.pydantic_function_tool(GetWeather, name="get_weather")
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}


def test_a_call_of_a_strict_tool_is_held_to_its_schema(real: AsyncLLM) -> None:
    """The bundled model knows no tools: a bias has it begin a call, the rest it can but follow."""
    [brace] = real.tokenizer.encode("{", add_special_tokens=False)
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": ASK,
        "tools": [STRICT],
        "temperature": 0,
        "max_tokens": 60,
    }
    begun = asked | {"logit_bias": {str(brace): 100}, "parallel_tool_calls": False}
    with serving(service_of(real, tool_call_parser="llama3_json")) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        choice = client.chat.completions.parse(**begun).choices[0]
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, GetWeather)
        plain = {"speculation": {"tree": "off"}}
        for chunks in (
            client.chat.completions.create(**begun, stream=True),
            client.chat.completions.create(**begun, stream=True, extra_body=plain),
        ):
            deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
            assert deltas[0].function.name == "get_weather"
            arguments = "".join(each.function.arguments for each in deltas)
            assert arguments == call.function.arguments
        free = client.chat.completions.create(**asked).choices[0].message
        assert free.tool_calls is None
        loose = WEATHER | {"function": STRICT["function"] | {"strict": False}}
        same = client.chat.completions.create(**asked | {"tools": [loose]}).choices[0].message
        assert free.content == same.content


@pytest.mark.parametrize("tool", [STRICT, WEATHER], ids=["strict", "loose"])
def test_an_answer_with_a_schema_or_a_call(real: AsyncLLM, tool: Any) -> None:
    """What agents ask that have tools and an output type."""
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    body = {"messages": ASK, "tools": [tool], "response_format": shape, "temperature": 0}
    encode = real.tokenizer.encode
    with serving(service_of(real)) as url:
        for begin, has_calls in (("{", False), ("<", True)):
            [token] = encode(begin, add_special_tokens=False)
            more = {"logit_bias": {token: 20}, "max_tokens": 100, "parallel_tool_calls": False}
            answer = post(url, "/v1/chat/completions", body | more)
            assert answer.status_code == 200, answer.text
            message = answer.json()["choices"][0]["message"]
            assert ("tool_calls" in message) == has_calls
            if not has_calls:
                assert json.loads(message["content"]).keys() == {"age"}


def test_what_is_asked_of_strict_tools(url: str, llm: Scripted) -> None:
    """Only what is strict is held, and an answer's shape goes before tools that are not."""
    body = {"messages": ASK, "tools": [STRICT, WEATHER]}
    assert post(url, "/v1/chat/completions", body).status_code == 200
    structure = llm.asked[-1][1].structure
    assert structure is not None
    assert structure.tag["format"]["triggers"] == ["<tool_call>"]
    for more in (
        {"tools": [WEATHER]},
        {"tools": [WEATHER], "response_format": {"type": "text"}},
        {"tool_choice": "none"},
    ):
        assert post(url, "/v1/chat/completions", body | more).status_code == 200
        assert llm.asked[-1][1].structure is None
    shape = {"regex": "[a-z]+"}
    loose = body | {"tools": [WEATHER], "structured_outputs": shape}
    assert post(url, "/v1/chat/completions", loose).status_code == 200
    assert llm.asked[-1][1].structure == StructuredOutputsParams(regex="[a-z]+")
    chosen = {"tools": [WEATHER], "tool_choice": "required", "structured_outputs": shape}
    for more, words in (
        ({"structured_outputs": shape}, "'get_weather' is strict, and its calls"),
        ({"guided_json": PERSON, "structured_outputs": shape}, "give one"),
        (chosen, "regex and tool_choice exclude each other"),
        ({"skip_special_tokens": True}, "skip_special_tokens cannot be true"),
    ):
        answer = post(url, "/v1/chat/completions", body | more)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"uniqueItems": True}, "properties.age has 'uniqueItems', which cannot be kept"),
        ({"type": "string", "pattern": "("}, "the schema cannot be compiled: "),
    ],
)
def test_a_schema_that_cannot_be_kept_is_told_of_with_its_tool(
    real: AsyncLLM, schema: dict[str, Any], words: str, choice: str
) -> None:
    function = {"name": "birthday", "parameters": PERSON | {"properties": {"age": schema}}}
    wrong = {"type": "function", "function": function | {"strict": True}}
    named = {"type": "function", "function": {"name": "birthday"}}
    body = {
        "messages": ASK,
        "tools": [STRICT, wrong],
        "tool_choice": named if choice == "named" else choice,
    }
    with serving(service_of(real)) as url:
        answer = post(url, "/v1/chat/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("the parameters of the function 'birthday': " + words)
    assert error["param"] == "tools"


def test_schemas_that_take_too_long_are_told_of_with_their_tools(
    real: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, go_on = service_of(real, grammar_timeout_s=0.02), threading.Event()
    monkeypatch.setattr(real.llm.engine.constraints, "prepare", lambda params: go_on.wait(60))
    with serving(service) as url:
        answer = post(url, "/v1/chat/completions", {"messages": ASK, "tools": [STRICT, WEATHER]})
        go_on.set()
        until(lambda: not service._compiling)
    message = answer.json()["error"]["message"]
    words = "the parameters of the function 'get_weather': the schema takes longer than 0.02 s"
    assert message.startswith(words)


def test_structural_tags_by_both_names(url: str, llm: Scripted) -> None:
    """vLLM's spellings; the older one is read as the newer."""
    schema = {"type": "json_schema", "json_schema": PERSON}
    tag = {"type": "tag", "begin": "<p>", "content": schema, "end": "</p>"}
    newer = {"type": "triggered_tags", "triggers": ["<p"], "tags": [tag]}
    older = {
        "type": "structural_tag",
        "structures": [{"begin": "<p>", "schema": PERSON, "end": "</p>"}],
        "triggers": ["<p"],
    }
    whole = {"type": "structural_tag", "format": newer}
    for more in (
        {"response_format": whole},
        {"response_format": older},
        {"structured_outputs": {"structural_tag": whole}},
        {"structured_outputs": {"structural_tag": json.dumps(older)}},
    ):
        assert post(url, "/v1/completions", {"prompt": "x"} | more).status_code == 200
        structure = llm.asked[-1][1].structure
        assert structure is not None
        assert structure.tag == whole


def test_formats_are_seen_in_templates() -> None:
    assert detect_format(TEMPLATE) == "hermes"
    assert detect_format("{{ tools }} [TOOL_CALLS]") == "mistral"
    assert (
        detect_format('{{ tools }} {"name": f, "parameters": {}} <|python_tag|>') == "llama3_json"
    )
    assert detect_format("{{ tools }} <tool_call><function=f>") is None
    assert detect_format("<tool_call>") is None
    assert detect_format("{{ tools }}") is None


def test_an_unknown_format_has_to_be_named(llm: Scripted) -> None:
    body = {"messages": ASK, "tools": [WEATHER]}
    template = TEMPLATE.replace("<tool_call>", "")
    other = Scripted(llm, template)
    other.pieces = CALL
    with serving(service_of(other)) as url:
        answer = post(url, "/v1/chat/completions", body)
        assert answer.status_code == 400
        assert "--tool-call-parser" in answer.json()["error"]["message"]
    with serving(service_of(other, tool_call_parser="hermes")) as url:
        [choice] = post(url, "/v1/chat/completions", body).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"


# --- log-probabilities ----------------------------------------------------------------------------

PLACES = [
    {5: entry(-0.5, 2, "Hel"), 6: entry(-0.25, 1, "Hi"), 7: entry(float("-inf"), 3, "x")},
    {6: entry(-0.125, 1, "lo"), 5: entry(-3.0, 2, "la")},
]
PLACE = entry(-0.5, 2, "Hel")


def test_the_shapes_of_log_probabilities(
    client: OpenAI, llm: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {5: "Hel", 6: "Hi", 7: "x"}
    monkeypatch.setattr(llm, "logprobs", PLACES)
    llm.tokenizer.decode = lambda ids, **_: "".join(told[each] for each in ids)
    try:
        chat = client.chat.completions.create(
            model=MODEL, messages=ASK, logprobs=True, top_logprobs=2
        )
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        first = logprobs.content[0]
        assert (first.token, first.logprob) == ("Hel", -0.5)
        assert [(top.token, top.logprob) for top in first.top_logprobs] == [
            ("Hi", -0.25),
            ("Hel", -0.5),
        ]
        streamed = client.chat.completions.create(
            model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, stream=True
        )
        content = [
            each
            for chunk in streamed
            if chunk.choices[0].logprobs
            for each in chunk.choices[0].logprobs.content or []
        ]
        assert content == logprobs.content
        old = client.completions.create(model=MODEL, prompt=[6, 7], logprobs=1).choices[0].logprobs
        assert old is not None
        assert old.tokens == ["Hel", "Hi"]
        assert old.token_logprobs == [-0.5, -0.125]
        assert old.top_logprobs == [{"Hi": -0.25, "Hel": -0.5}, {"Hi": -0.125}]
        assert old.text_offset == [0, 3]
        llm.prompt_logprobs = [None, {7: entry(-1.0, 1, "x")}]
        echoed = client.completions.create(
            model=MODEL, prompt=[6, 7], logprobs=1, echo=True, max_tokens=0
        )
        assert echoed.choices[0].text == "Hix"
        assert echoed.usage is not None
        assert echoed.usage.completion_tokens == 0
        of_prompt = echoed.choices[0].logprobs
        assert of_prompt is not None
        assert of_prompt.token_logprobs == [None, -1.0]
        assert of_prompt.tokens == ["Hi", "x"]
        llm.prompt_logprobs = [None, {7: entry(-1.0, 3, "x"), 6: entry(-0.1, 1, "Hi"), 5: PLACE}]
        both = client.completions.create(
            model=MODEL, prompt=[6, 7], logprobs=2, echo=True, extra_body={"prompt_logprobs": 1}
        ).choices[0]
        assert llm.asked[-1][1].prompt_logprobs == 2
        assert both.logprobs is not None
        assert both.logprobs.top_logprobs[1] == {"Hi": -0.1, "Hel": -0.5, "x": -1.0}
        assert list(both.prompt_logprobs[1]) == ["7", "6"]  # type: ignore[attr-defined]
    finally:
        del llm.tokenizer.decode


# --- prompts --------------------------------------------------------------------------------------


def test_messages_as_templates_know_them(url: str, llm: Scripted) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    post(url, "/v1/chat/completions", {"messages": messages})
    assert llm.prompt == "<system>Be brief.<user>one\ntwo<assistant>"


def test_a_message_is_continued(url: str, llm: Scripted) -> None:
    messages = [*ASK, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "continue_final_message": True}
    post(url, "/v1/chat/completions", body)
    assert llm.prompt == "<user>How is the weather in Bern?<assistant>It is"


def test_what_is_asked_of_the_sampler(url: str, llm: Scripted) -> None:
    body = {
        "messages": ASK,
        "temperature": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "max_completion_tokens": 9,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "min_tokens": 2,
        "seed": 5,
        "top_p": None,
        "speculation": {"tree": "1,1", "max_nodes": 2},
        "target_tpot_s": 0.5,
        "response_format": {"type": "text"},
    }
    assert post(url, "/v1/chat/completions", body).status_code == 200
    params = llm.asked[-1][1]
    assert (params.temperature, params.top_k, params.min_p, params.max_tokens) == (0.5, 3, 0.1, 9)
    assert (params.stop_strings, params.ignore_eos, params.min_tokens) == (("a", "b"), True, 2)
    assert (params.seed, params.top_p, params.target_tpot_s) == (5, 1.0, 0.5)
    assert params.own_speculation is not None
    assert params.own_speculation.max_nodes == 2
    post(url, "/v1/chat/completions", {"messages": ASK})
    assert llm.asked[-1][1].max_tokens is None
    post(url, "/v1/completions", {"prompt": "x"})
    assert llm.asked[-1][1].max_tokens == 16
