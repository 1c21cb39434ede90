"""`specinfer serve` as a process: how it starts, logs, drains, ends, and comes back."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from specinfer.errors import SpecInferError
from specinfer.serve.launch import _allow_connections, _Server, bind, run_server
from specinfer.serve.settings import ServerSettings
from tests.command_line import refuses, run
from tests.serving import CLIENT, post, service_of, until

FLAGS = ("--drafter", "zoo:parley-draft", "--tree", "2,2,1", "--max-model-len", "256")
LONG = {"prompt": "Once upon a time", "max_tokens": 240, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def started(
    log: Path, port: int, flags: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, as it is started by hand; its log goes to a file."""
    command = [sys.executable, "-m", "specinfer", "serve", "zoo:parley", *FLAGS, *flags]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stderr=errors, env=os.environ | environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def is_up(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def test_it_may_hold_as_many_connections_as_it_is_allowed() -> None:
    resource = pytest.importorskip("resource")
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft - 1 if soft != resource.RLIM_INFINITY else 1024
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        _allow_connections()
        now, still = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert still == hard
    assert now > few or few >= 1 << 16


def test_killed_and_back_while_a_client_retries_then_drained(tmp_path: Path) -> None:
    port, logs = free_port(), [tmp_path / "first", tmp_path / "second"]
    url = f"http://127.0.0.1:{port}"
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    with started(logs[0], port, ("--log-prompts",)) as process:
        until(lambda: is_up(port))
        before = post(url, "/v1/completions", body).json()["choices"]
        # Its line is written once the answer is out: the client may have it a moment before
        until(lambda: 'prompt="Once upon a time"' in logs[0].read_text())
        process.kill()
        process.wait()
    headers = {"authorization": "Bearer b", "x-request-id": "mine"}
    with started(logs[1], port, ("--log-format", "json"), SPECINFER_API_KEY="a, b") as process:
        assert ask_until_answered(url, body, headers)["choices"] == before
        assert post(url, "/v1/completions", body).status_code == 401
        check_draining(url, port, process, headers)
    records = [json.loads(line) for line in logs[1].read_text().splitlines()]
    events = [record["event"] for record in records]
    assert records[events.index("serving")]["url"] == url
    assert "draining" in events
    asked = [r for r in records if r["event"] == "request" and r["request_id"] == "mine"]
    assert (asked[-1]["status"], asked[-1]["completion_tokens"]) == (200, 8 * 240)
    assert "Once upon" not in logs[1].read_text(), "prompts are nobody's business"


def ask_until_answered(url: str, body: Any, headers: dict[str, str]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            return post(url, "/v1/completions", body, headers=headers).json()
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("it never came back")


def check_draining(
    url: str, port: int, process: subprocess.Popen[bytes], headers: dict[str, str]
) -> None:
    """SIGTERM: nothing new gets in, what runs is finished, and the exit code is 0."""
    body = LONG | {"stream": True, "n": 8}
    with CLIENT.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: not is_up(port))
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert reasons.count("length") == 8
    assert process.wait(60) == 0


def test_the_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def run() -> None:
        service = SimpleNamespace(
            settings=ServerSettings(), num_taken=0, llm=SimpleNamespace(fail_all=ended.append)
        )
        with bind(ServerSettings(port=0)) as taken:
            server = _Server(uvicorn.Config("none"), service, taken)
            with server.capture_signals():
                signal.raise_signal(signal.SIGTERM)
                await asyncio.sleep(0)
                assert server.should_exit
                assert service.is_draining
                assert ended == []
                signal.raise_signal(signal.SIGTERM)
                assert ended == [128 + signal.SIGTERM]

    asyncio.run(run())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_server_ends_where_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error, so that who supervises it starts it again."""
    service = service_of(SimpleNamespace(llm=SimpleNamespace(engine=None), is_alive=False))
    monkeypatch.setattr("specinfer.serve.launch.make_app", lambda service: None)
    with bind(ServerSettings(port=0)) as taken, pytest.raises(SpecInferError, match="ended"):
        run_server(service, taken)


@pytest.mark.parametrize("keys", ["", " ", "a,,b", "a,"])
def test_keys_that_are_none_are_refused(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specinfer.cli.serve._load", None)
    monkeypatch.setenv("SPECINFER_API_KEY", keys)
    refuses(run("serve", "zoo:parley", "--port", "0"), ["SPECINFER_API_KEY", "empty key"])


def test_a_port_in_use_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specinfer.cli.serve._load", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refuses(
            run("serve", "zoo:parley", "--port", port), [f"port={port}", "another --host or --port"]
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "99999"], ["port=99999"]),
        (["--tool-call-parser", "mine"], ["tool_call_parser='mine'", "hermes"]),
        (["--tree", "oak"], ["tree='oak'"]),
    ],
)
def test_flags_that_cannot_be(flags: list[str], words: list[str]) -> None:
    refuses(run("serve", "zoo:parley", *flags), words)


def test_help_names_the_flags_of_the_server_and_none_of_one_request() -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("serve", "--help").stdout)
    for flag in ("--api-key", "--host", "--max-waiting", "--drain-seconds", "--drafter"):
        assert flag in text
    assert "--temperature" not in text
    assert "--model " not in text
