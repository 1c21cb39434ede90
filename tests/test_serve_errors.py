"""What the server refuses, how, and that it goes on afterwards."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from specinfer.async_llm import AsyncLLM
from specinfer.errors import ConfigError
from specinfer.request import SamplingParams
from specinfer.serve.errors import ApiError
from specinfer.serve.settings import ServerSettings
from tests.engines import free_blocks
from tests.serving import CLIENT, MODEL, Held, pair, post, service_of, serving, until
from tests.test_structured import nested

HI = [{"role": "user", "content": "Hi"}]
LONG = {"prompt": "Once upon a time", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = pair(max_num_seqs=4)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def url(llm: AsyncLLM) -> Iterator[str]:
    with serving(service_of(llm, max_body_bytes=100_000, max_prompt_tokens=200)) as url:
        yield url


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's error object, whole."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return dict(body["error"])


TOO_DEEP = (400, "structured_outputs", "nested more than 64 deep")
NO_JSON = (400, "structured_outputs", "json is no JSON")
NO_TAG = (400, "response_format", "structural_tag must be {")
BUDGET = {"type": "structural_tag", "format": {"type": "any_text", "max_tokens": 3}}
NO_BUDGET = (400, "response_format", "structural_tag has max_tokens")
NO_TYPE = {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}
NOT_COMPILED = (400, "response_format", "response_format.json cannot be compiled: Unsupported type")
ALL_OF = (400, "structured_outputs", "allOf=5")

BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {}, 400, "prompt", "required"),
    (COMPLETIONS, {"prompt": "x", "foo": 1}, 400, "foo", "unknown parameter: foo"),
    (COMPLETIONS, {"prompt": "x", "speculation": {"a": 1}}, 400, "speculation.a", "unknown"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, 400, "best_of", "not supported"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "at least 0"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400, "temperature", "number"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p", "(0, 1]"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n", "greater than"),
    (COMPLETIONS, {"prompt": "x", "n": 1000}, 400, "n", "less than"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 999}, 400, None, "the context holds 256"),
    (COMPLETIONS, {"prompt": "x " * 210, "max_tokens": 1}, 400, None, "takes 200"),
    (COMPLETIONS, {"prompt": ""}, 400, None, "empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": ["x", ""]}, 400, None, "empty"),
    (COMPLETIONS, {"prompt": [1, 99999]}, 400, None, "token id 99999"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt[0]", ""),
    (COMPLETIONS, {"prompt": "x", "stop": ""}, 400, "stop", ""),
    (COMPLETIONS, {"prompt": "x", "stop": ["y" * 2000]}, 400, "stop[0]", "1024"),
    (COMPLETIONS, {"prompt": "x", "seed": 1 << 63}, 400, "seed", ""),
    (COMPLETIONS, {"prompt": [True, False]}, 400, "prompt[0]", ""),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "3"}, 400, "max_tokens", "integer"),
    (COMPLETIONS, {"prompt": "x", "echo": 1}, 400, "echo", "boolean"),
    (COMPLETIONS, {"prompt": "x", "repetition_penalty": 1e-40}, 400, "repetition_penalty", "in ["),
    (COMPLETIONS, {"prompt": "x", "target_tpot_s": 1e-300}, 400, "target_tpot_s", "at least"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"json": nested(400)}}, *TOO_DEEP),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "structural_tag"}}, *NO_TAG),
    (COMPLETIONS, {"prompt": "x", "response_format": BUDGET}, *NO_BUDGET),
    (COMPLETIONS, {"prompt": "x", "response_format": NO_TYPE}, *NOT_COMPILED),
    (COMPLETIONS, {"prompt": "x", "guided_json": "[" * 50_000}, *NO_JSON),
    (COMPLETIONS, {"prompt": "x", "guided_json": {"allOf": 5}}, *ALL_OF),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "by id"),
    (COMPLETIONS, {"prompt": "x", "speculation": {"tree": "oak"}}, 400, "tree", "tree shape"),
    (
        COMPLETIONS,
        {"prompt": "x", "guided_regex": "a", "structured_outputs": {"regex": "b"}},
        *(400, "structured_outputs", "give one"),
    ),
    (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "model", "not served"),
    (CHAT, {"messages": []}, 400, "messages", ""),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", ""),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        *(400, "messages[0].content[0].type", "'text'"),
    ),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    (
        CHAT,
        {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4},
        *(400, "max_completion_tokens", "differ"),
    ),
    (CHAT, {"messages": HI, "tool_choice": "auto"}, 400, "tool_choice", "needs tools"),
    (
        CHAT,
        {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]},
        *(400, "tools", "knows no tools"),
    ),
    (CHAT, {"messages": HI, "continue_final_message": True}, 400, "continue_final_message", ""),
    (
        CHAT,
        {"messages": HI, "chat_template_kwargs": {"messages": []}},
        *(400, "chat_template_kwargs", "messages"),
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "more": nested(400)}]},
        *(400, "messages[0]", "nested more than 64 deep"),
    ),
    ("/tokenize", {}, 400, "prompt", "either"),
    ("/detokenize", {"tokens": [99999]}, 400, "tokens", "99999"),
    ("/v1/nothing", {}, 404, None, "Not Found"),
    ("/health", {}, 405, None, "Method Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused(
    url: str,
    path: str,
    body: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
    stream: bool,
) -> None:
    streamed = {"stream": True} if stream and path.startswith("/v1") else {}
    error = refusal(post(url, path, body | streamed), status)
    assert words in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("name", ["self", "documents", "enable_thinking"])
def test_templates_may_be_told_anything(url: str, name: str) -> None:
    body = {"messages": HI, "max_tokens": 1, "chat_template_kwargs": {name: 1}}
    assert post(url, CHAT, body).status_code == 200


@pytest.mark.parametrize("field", ["best_of", "use_beam_search", "suffix", "stop", "user", "seed"])
def test_fields_that_ask_for_nothing_are_taken(url: str, field: str) -> None:
    neutral = {"best_of": 1, "use_beam_search": False, "suffix": "", "user": "me"}
    body = {"prompt": "x", "max_tokens": 1, field: neutral.get(field)}
    assert post(url, COMPLETIONS, body).status_code == 200


def test_options_of_a_stream_need_a_stream(url: str) -> None:
    answer = post(url, COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}})
    assert refusal(answer, 400)["param"] == "stream_options"


def test_bodies_that_are_no_json(url: str) -> None:
    for body in (b"{", b"\xff", b"[" * 50_000, b"", b"null", b'"text"'):
        answer = CLIENT.post(
            url + COMPLETIONS, content=body, headers={"content-type": "application/json"}
        )
        refusal(answer, 400)
    nan = CLIENT.post(url + COMPLETIONS, content=b'{"prompt": "x", "temperature": NaN}')
    refusal(nan, 400)


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("body", [b"", b"null", b'"text"', b"[1]"])
def test_a_body_that_is_no_object_is_told_what_to_be(url: str, kind: str, body: bytes) -> None:
    answer = CLIENT.post(url + COMPLETIONS, content=body, headers={"content-type": kind})
    message = "the body must be a JSON object, sent as Content-Type: application/json"
    assert refusal(answer, 400)["message"] == message


def test_a_form_is_told_its_content_type(url: str) -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = CLIENT.post(url + COMPLETIONS, content=b'{"prompt": "x"}', headers=kind)
    assert "Content-Type: application/json" in refusal(answer, 400)["message"]


def test_bodies_that_are_too_large(url: str) -> None:
    text = "x" * 200_000
    assert refusal(post(url, COMPLETIONS, {"prompt": text}), 413)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:  # without saying how long it will be
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"x" * 10_000

    answer = CLIENT.post(
        url + COMPLETIONS, content=pieces(), headers={"content-type": "application/json"}
    )
    refusal(answer, 413)


def test_the_official_client_knows_the_errors(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="at least 0") as caught:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1)
    assert caught.value.param == "temperature"


# --- keys and browsers ----------------------------------------------------------------------------


def test_keys(llm: AsyncLLM) -> None:
    with serving(service_of(llm, api_key=("secret", "other"))) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            for path in (COMPLETIONS, "/tokenize", "/nothing"):
                error = refusal(post(url, path, {"prompt": "x"}, headers=headers), 401)
                assert error["code"] == "invalid_api_key"
            refusal(CLIENT.get(f"{url}/metrics", headers=headers), 401)
        for key in ("secret", "other"):
            client = OpenAI(base_url=f"{url}/v1", api_key=key)
            assert client.models.list().data[0].id == MODEL
        assert CLIENT.get(f"{url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0).models.list()


def test_other_origins_are_let_in_only_where_allowed(llm: AsyncLLM, url: str) -> None:
    asking = {"origin": "https://here.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in CLIENT.options(url + CHAT, headers=asking).headers
    service = service_of(llm, allowed_origins=("https://here.example",), api_key=("secret",))
    with serving(service) as open_url:
        answer = CLIENT.options(open_url + CHAT, headers=asking)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://here.example"
        other = CLIENT.options(open_url + CHAT, headers=asking | {"origin": "https://x.example"})
        assert "access-control-allow-origin" not in other.headers


# --- load and failure -----------------------------------------------------------------------------


def test_too_many_wait(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four run and two wait, held within a step until the other six are refused."""
    full = free_blocks(llm.llm.engine)
    held = Held(llm, monkeypatch, lambda steps: True)
    with serving(service_of(llm, max_waiting=2)) as url:
        asked = LONG | {"max_tokens": 60}
        refusal(post(url, COMPLETIONS, asked | {"n": 7}), 400)
        with ThreadPoolExecutor(12) as pool:
            asking = [pool.submit(post, url, COMPLETIONS, asked) for _ in range(12)]
            until(lambda: sum(each.done() for each in asking) == 6)
            held.go_on.set()
        answers = [each.result() for each in asking]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 6
        for answer in refused:
            assert refusal(answer, 503)["code"] == "overloaded"
            assert answer.headers["retry-after"] == "1"
        texts = {answer.json()["choices"][0]["text"] for answer in answers if answer not in refused}
        assert len(texts) == 1
        assert post(url, COMPLETIONS, LONG | {"max_tokens": 1}).status_code == 200
    until(lambda: free_blocks(llm.llm.engine) == full)


def test_who_waits_for_memory_waits(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(llm, max_waiting=1)
    monkeypatch.setattr(llm.llm.engine.stats, "num_places", 2)  # of 4
    service.num_taken = 1
    service._check_places(2)
    for num, status in ((3, 503), (6, 400)):
        with pytest.raises(ApiError) as caught:
            service._check_places(num)
        assert caught.value.status == status


def test_grammars_that_take_too_long(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused and keeps its place until it is done; requests without one are served."""
    pytest.importorskip("xgrammar")
    service, go_on = service_of(llm, grammar_timeout_s=0.02), threading.Event()
    asked = {"prompt": "Once", "max_tokens": 4, "structured_outputs": {"regex": "[a-z]+"}}
    with serving(service) as url:
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm.engine.constraints, "prepare", lambda params: go_on.wait(60))
            for _ in range(4):
                error = refusal(post(url, COMPLETIONS, asked), 400)
                assert "longer than 0.02 s to compile" in error["message"]
                assert error["param"] == "structured_outputs"
            answer = post(url, COMPLETIONS, asked)
            assert refusal(answer, 503)["code"] == "overloaded"
            assert answer.headers["retry-after"] == "1"
            assert post(url, COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status_code == 200
        go_on.set()
        until(lambda: not service._compiling)
        service.settings = ServerSettings()
        assert post(url, COMPLETIONS, asked).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long(
    llm: AsyncLLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is late once the engine has it: until then a busy machine has a minute."""
    late_s = iter([0.0, 59.95])
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + next(late_s), time=time.time)
    monkeypatch.setattr("specinfer.serve.state.time", clock)
    full = free_blocks(llm.llm.engine)
    with serving(service_of(llm, request_timeout_s=60.0)) as url:
        answer = post(url, COMPLETIONS, LONG | {"n": 4, "stream": stream})
        if not stream:
            assert refusal(answer, 504)["code"] == "timeout"
        else:
            *_, last, done = answer.text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    until(lambda: free_blocks(llm.llm.engine) == full)


def test_reading_the_prompt_takes_of_the_time(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(*args: Any, **options: Any) -> list[int]:
        await asyncio.sleep(60)
        return []

    service = service_of(llm, request_timeout_s=0.05)
    monkeypatch.setattr(service, "encode", encode)
    with serving(service) as url:
        assert refusal(post(url, CHAT, {"messages": HI}), 504)["code"] == "timeout"


def test_a_body_that_does_not_arrive(llm: AsyncLLM) -> None:
    with serving(service_of(llm, body_timeout_s=0.05)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), 60) as asking:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 99\r\n"
            asking.sendall(f'{head}content-type: application/json\r\n\r\n{{"prompt"'.encode())
            answer = b"".join(iter(lambda: asking.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout_s" in answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_step_is_a_500_and_the_next_request_is_served(
    llm: AsyncLLM, url: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.llm.engine
    full, run = free_blocks(engine), engine.target.run
    with monkeypatch.context() as patch:
        failing = iter([False, False, True])

        def run_or_fail(spans: Any) -> Any:
            if next(failing, False):
                raise RuntimeError("the device is gone")
            return run(spans)

        patch.setattr(engine.target, "run", run_or_fail)
        answer = post(url, COMPLETIONS, LONG | {"stream": stream})
        assert "the device" not in answer.text, "the inside of a failure is nobody's business"
        if stream:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            assert '"code":"engine_error"' in answer.text
            failing = iter([False, True])
            with pytest.raises(openai.APIError, match="the engine failed"):
                list(client.completions.create(model=MODEL, prompt="Once upon", stream=True))
        else:
            assert refusal(answer, 500)["code"] == "engine_error"
    assert post(url, COMPLETIONS, LONG | {"max_tokens": 4}).status_code == 200
    until(lambda: free_blocks(engine) == full)


def test_going_down_tells_those_that_still_run(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, held = service_of(llm), Held(llm, monkeypatch, lambda steps: True)
    with serving(service) as url, ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, url, COMPLETIONS, LONG | {"n": 4})
        assert held.under_way.wait(60)
        service.is_draining = True
        assert refusal(post(url, COMPLETIONS, LONG), 503)["code"] == "shutting_down"
        llm.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
        held.go_on.set()
        assert refusal(running.result(), 503)["code"] == "shutting_down"
        until(lambda: service.num_taken == 0)


def test_a_waiting_request_survives_a_failed_step(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held within the first step until all six are there; the second one fails."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    engine, held = llm.llm.engine, Held(llm, monkeypatch, lambda steps: True)

    async def last() -> Any:
        return [output async for output in llm.generate("Once upon a time", params)][-1]

    async def run() -> list[Any]:
        asking = asyncio.gather(*(last() for _ in range(6)), return_exceptions=True)
        while len(llm._streams) < 6:
            await asyncio.sleep(0)
        held.go_on.set()
        return await asking

    run_target = engine.target.run

    def run_or_fail(spans: Any) -> Any:
        if len(held.steps) == 2:
            raise RuntimeError("once")
        return run_target(spans)

    monkeypatch.setattr(engine.target, "run", run_or_fail)
    outcomes = asyncio.run(run())
    assert [isinstance(each, RuntimeError) for each in outcomes] == [True] * 4 + [False] * 2
    assert all(len(each.outputs[0].token_ids) == 40 for each in outcomes[4:])


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"port": -1}, "port"),
        ({"port": 70000}, "at most 65535"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"drain_seconds": -1}, "drain_seconds"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"body_timeout_s": 0}, "body_timeout_s"),
        ({"stall_timeout_s": 0}, "stall_timeout_s"),
        ({"grammar_timeout_s": 0}, "grammar_timeout_s"),
        ({"tool_call_parser": "mine"}, "hermes"),
        ({"log_format": "xml"}, "logfmt"),
        ({"api_key": ("",)}, "api_key"),
        ({"api_key": (" b",)}, "api_key"),
        ({"metrics_prefix": "a-b"}, "metrics_prefix"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerSettings(**fields)
