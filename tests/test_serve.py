"""The server over the bundled pair, asked by the clients that people have."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from specinfer.async_llm import AsyncLLM
from specinfer.outputs import RequestOutput, RequestStats
from specinfer.request import SamplingParams
from specinfer.serve.state import Service
from specinfer.serve.usage import usage_of
from tests.serving import CLIENT, MODEL, Held, post, service_of, serving, until

STORY = [{"role": "user", "content": "Tell me a story."}]
ASKED: dict[str, Any] = {"model": MODEL, "messages": STORY, "temperature": 0, "max_tokens": 24}
LONG = {"prompt": "Once upon a time", "max_tokens": 240, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(parley: AsyncLLM) -> Service:
    return service_of(parley)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serving(service) as url:
        yield url


def offline(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> str:
    """What the engine says without a server."""

    async def run() -> str:
        outputs = [output async for output in llm.generate(prompt, params)]
        return outputs[-1].outputs[0].text

    return asyncio.run(run())


# --- the official client --------------------------------------------------------------------------


def test_an_answer_is_the_engine_s(client: OpenAI, parley: AsyncLLM) -> None:
    answer = client.chat.completions.create(**ASKED)
    prompt = parley.tokenizer.apply_chat_template(STORY)
    expected = offline(parley, prompt, SamplingParams(temperature=0, max_tokens=24))
    [choice] = answer.choices
    assert choice.message.content == expected
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
    assert answer.usage.total_tokens == len(prompt) + 24
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")


def test_a_streamed_answer_is_the_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options=options))
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == whole.choices[0].message.content
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert end.choices[0].finish_reason == "length"
    assert not end.choices[0].delta.content
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(middle) < 24, "several tokens come with a step"


def test_the_async_client(url: str) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            texts = []
            for _ in range(2):
                stream = await client.chat.completions.create(**ASKED, stream=True)
                texts.append("".join([c.choices[0].delta.content or "" async for c in stream]))
            together = await asyncio.gather(
                *(client.chat.completions.create(**ASKED) for _ in range(4))
            )
            return texts + [str(each.choices[0].message.content) for each in together]

    assert len(set(asyncio.run(run()))) == 1


def test_several_samples_and_seeds(client: OpenAI) -> None:
    asked = ASKED | {"temperature": 1.0, "seed": 7, "n": 3}
    first = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    off = client.chat.completions.create(**asked, extra_body={"speculation": {"tree": "off"}})
    assert [choice.message.content for choice in off.choices] == texts


def test_seeds_may_be_negative(url: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 1}
    answers = [post(url, "/v1/completions", body | {"seed": -5}).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_completions_take_every_form_of_prompt(client: OpenAI, parley: AsyncLLM) -> None:
    texts = ["Once upon a time", "I want to book"]
    ids = [parley.tokenizer.encode(text) for text in texts]
    prompts: list[Any] = [texts[0], texts, ids[0], ids]
    told = []
    for prompt in prompts:
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=8, temperature=0, n=2
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        told.append([choice.text for choice in answer.choices])
    assert told[0] == told[2]
    assert told[1] == told[3]
    assert told[1][:2] == told[0]
    assert len(told[1]) == 4
    echoed = client.completions.create(
        model=MODEL, prompt=texts[0], max_tokens=8, temperature=0, echo=True
    )
    assert echoed.choices[0].text == texts[0] + told[0][0]
    streamed = client.completions.create(
        model=MODEL, prompt=texts, max_tokens=8, temperature=0, echo=True, stream=True
    )
    together = ["", ""]
    for chunk in streamed:
        together[chunk.choices[0].index] += chunk.choices[0].text
    assert together == [texts[0] + told[1][0], texts[1] + told[1][2]]


def test_stop_and_length(client: OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=0
    ).choices[0]
    word = whole.text.split()[4]
    cut = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=0, stop=[word]
    ).choices[0]
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"


def test_a_prediction_is_counted_as_openai_counts(client: OpenAI) -> None:
    text = client.chat.completions.create(**ASKED).choices[0].message.content
    plain = client.chat.completions.create(**ASKED)
    guessed = client.chat.completions.create(
        **ASKED,
        prediction={"type": "content", "content": str(text)},
        extra_body={"speculation": {"tree": "1,1,1,1,1"}},  # whatever was learnt by now
    )
    assert guessed.choices[0].message.content == text
    assert plain.usage is not None
    assert guessed.usage is not None
    details = guessed.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.accepted_prediction_tokens > 8
    assert plain.usage.completion_tokens_details is not None
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert plain.usage.completion_tokens_details.rejected_prediction_tokens == 0
    wrong = client.chat.completions.create(
        **ASKED, prediction={"type": "content", "content": "zebra zebra zebra"}
    )
    assert wrong.choices[0].message.content == text
    assert wrong.usage is not None
    assert wrong.usage.completion_tokens_details is not None
    assert wrong.usage.completion_tokens_details.rejected_prediction_tokens > 2


def test_each_sample_s_prediction_is_accepted_once() -> None:
    once, never = RequestStats(num_predicted=3), RequestStats(num_predicted=3)
    once.num_predicted_accepted = 9  # the output repeats what was predicted
    both = RequestStats()
    both.add(once)
    both.add(never)
    output = RequestOutput("r", None, [1], [], True, both)
    details = usage_of([output])["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 3}


def test_what_speculation_did_is_told_on_request(url: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    assert "metrics" not in post(url, "/v1/completions", body).json()
    answer = post(url, "/v1/completions", body | {"include_metrics": True}).json()
    told = answer["metrics"]["speculative_decoding"]
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] > 0
    accepted = sum(j * n for j, n in enumerate(told["acceptance_histogram"]))
    assert accepted == told["num_accepted_draft_tokens"] > 0
    assert told["mean_acceptance_length"] == 1 + accepted / told["num_spec_steps"]
    assert told["draft_acceptance_rate"] == accepted / told["num_draft_tokens"]
    off = body | {"include_metrics": True, "speculation": {"tree": "off"}}
    plain = post(url, "/v1/completions", off).json()
    assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    assert plain["choices"] == answer["choices"]


def test_models_and_facts(client: OpenAI, url: str) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    assert CLIENT.get(f"{url}/health").status_code == 200
    assert CLIENT.get(f"{url}/version").json()["version"].count(".") == 2


def test_tokens_and_back(url: str, parley: AsyncLLM) -> None:
    told = post(url, "/tokenize", {"prompt": "Hello there", "return_token_strs": True}).json()
    assert told["tokens"] == parley.tokenizer.encode("Hello there")
    assert told["count"] == len(told["token_strs"]) == 2
    assert post(url, "/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "Hello there"}
    chat = post(url, "/tokenize", {"messages": STORY}).json()
    assert chat["tokens"] == parley.tokenizer.apply_chat_template(STORY)


# --- laws -----------------------------------------------------------------------------------------


def test_log_probabilities(client: OpenAI, parley: AsyncLLM) -> None:
    asked = ASKED | {"max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert "".join(each.token for each in content) == whole.message.content
    for each in content:  # greedy: the first is the one that came
        assert each.top_logprobs[0].token == each.token
        chances = [top.logprob for top in each.top_logprobs]
        assert chances == sorted(chances, reverse=True)
        assert each.bytes == list(each.token.encode())
    streamed = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        for each in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert [each.logprob for each in streamed] == pytest.approx(
        [e.logprob for e in content], abs=1e-4
    )
    text = "Once upon a time, there was"
    echoed = client.completions.create(
        model=MODEL, prompt=text, echo=True, logprobs=1, max_tokens=0
    )
    [choice] = echoed.choices
    assert choice.text == text
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == text
    assert (choice.logprobs.token_logprobs or [])[0] is None
    assert all(each < 0 for each in (choice.logprobs.token_logprobs or [])[1:])
    assert len(choice.logprobs.tokens or []) == len(parley.tokenizer.encode(text))
    assert echoed.usage is not None
    assert echoed.usage.completion_tokens == 0


def test_biases_and_penalties_reach_the_law(client: OpenAI, parley: AsyncLLM) -> None:
    plain = client.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=0)
    [token] = parley.tokenizer.encode("Hello")
    biased = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert biased.choices[0].text == "Hello" * 4
    less = client.completions.create(
        model=MODEL,
        prompt="Once",
        max_tokens=4,
        temperature=0,
        logit_bias={str(token): 100},
        frequency_penalty=2,
        extra_body={"bad_words": ["Hello"]},
    )
    assert "Hello" not in less.choices[0].text
    assert "Hello" not in plain.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_follow_a_schema(client: OpenAI, temperature: float) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    asked = ASKED | {"temperature": temperature, "seed": 2, "max_tokens": 120}
    answer = client.chat.completions.create(**asked, response_format=shape).choices[0]
    assert answer.finish_reason == "stop"
    person = json.loads(str(answer.message.content))
    assert person.keys() == {"name", "age"}
    older = client.chat.completions.create(**asked, extra_body={"guided_json": SCHEMA}).choices[0]
    newer = {"structured_outputs": {"json": SCHEMA}}
    again = client.chat.completions.create(**asked, extra_body=newer).choices[0]
    assert older.message.content == again.message.content == answer.message.content


def test_choices_and_expressions(url: str) -> None:
    body = {"prompt": "Once", "temperature": 1.0, "max_tokens": 20}
    for field, value in (("guided_choice", ["red", "green"]), ("guided_regex", "(red|green)")):
        [choice] = post(url, "/v1/completions", body | {field: value}).json()["choices"]
        assert choice["text"] in ("red", "green")
        assert choice["finish_reason"] == "stop"
    bad = post(url, "/v1/completions", body | {"guided_regex": "("})
    assert bad.status_code == 400
    assert bad.json()["error"]["code"] == "invalid_value"


def test_equal_beginnings_are_computed_once(url: str) -> None:
    prompt = list(range(100, 164))
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "cache_salt": "mine"}
    counts = [
        post(url, "/v1/completions", body | more).json()["usage"]["prompt_tokens_details"]
        for more in ({}, {}, {"cache_salt": "yours"})
    ]
    assert [each["cached_tokens"] for each in counts] == [0, 48, 0]


# --- other clients --------------------------------------------------------------------------------


def test_langchain(url: str, client: OpenAI) -> None:
    chat = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=24
    )
    expected = client.chat.completions.create(**ASKED).choices[0].message.content
    answer = chat.invoke("Tell me a story.")
    assert answer.content == expected
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 24
    assert "".join(str(each.content) for each in chat.stream("Tell me a story.")) == expected


def test_curl(url: str, client: OpenAI) -> None:
    command = ["curl", "-sSN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    body = json.dumps(ASKED | {"stream": True})
    out = subprocess.run([*command, "-d", body], capture_output=True, text=True, check=True).stdout
    assert out.endswith("\n\ndata: [DONE]\n\n")
    events = out.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == client.chat.completions.create(**ASKED).choices[0].message.content


def test_the_headers_of_a_stream(url: str) -> None:
    answer = post(
        url,
        "/v1/completions",
        LONG | {"max_tokens": 4, "stream": True},
        headers={"X-Request-Id": "a-1"},
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-request-id"] == "a-1"
    assert '"id":"cmpl-a-1"' in answer.text
    odd = post(url, "/v1/completions", LONG | {"max_tokens": 1}, headers={"X-Request-Id": 'a b"c'})
    assert odd.headers["x-request-id"] != 'a b"c'


def test_usage_in_every_chunk(url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = LONG | {"max_tokens": 12, "stream": True, "stream_options": options}
    events = post(url, "/v1/completions", body).text.split("\n\n")
    counts = [json.loads(e[6:])["usage"]["completion_tokens"] for e in events if "{" in e]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    echoed = body | {"max_tokens": 0, "echo": True}
    events = post(url, "/v1/completions", echoed).text.split("\n\n")
    assert {json.loads(e[6:])["usage"]["completion_tokens"] for e in events if "{" in e} == {0}


def test_a_stream_carries_trees_where_asked(url: str) -> None:
    body = ASKED | {"stream": True}
    answer = post(url, "/v1/chat/completions", body | {"stream_options": {"include_tree": True}})
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if "{" in line]
    trees = [event["tree"] for event in events if "tree" in event]
    assert [tree["step"] for tree in trees] == list(range(1, len(trees) + 1))
    assert len(trees) > 1
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    told = "".join(token["text"] for tree in trees for token in tree["emitted"])
    assert told == "".join(texts)
    assert '"tree"' not in post(url, "/v1/chat/completions", body).text


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(
    url: str, service: Service, parley: AsyncLLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held within a step until the server has seen that nobody listens: that step is the last."""
    engine, allocator = parley.llm.engine, parley.llm.engine.scheduler._allocator
    until(lambda: service.num_taken == 0 and not engine.has_work)
    held = Held(parley, monkeypatch, lambda steps: len(steps) == 3)
    with closing(HTTPConnection(url.removeprefix("http://"))) as client:
        body = json.dumps(LONG | {"stream": stream, "n": 4})
        client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            assert client.getresponse().readline().startswith(b"data: {")
        assert held.under_way.wait(60)
    until(lambda: service.num_taken == 0)
    held.go_on.set()
    until(lambda: allocator.num_free == allocator.num_blocks and not engine.has_work)
    assert len(held.steps) == 3


def test_places_are_given_back(service: Service) -> None:
    until(lambda: service.num_taken == 0)
