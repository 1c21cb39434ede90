"""`specinfer serve` as a process: how it starts, logs, drains, ends, and comes back."""

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
from typing import Any

import httpx
import pytest

from tests.command_line import refuses, run
from tests.serving import post, until

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
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_lets_what_runs_finish(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with started(log, port, ("--log-format", "json"), SPECINFER_API_KEY="a,b") as process:
        until(lambda: is_up(port), 60)
        assert post(url, "/v1/completions", LONG).status_code == 401
        headers = {"authorization": "Bearer b", "x-request-id": "mine"}
        with (
            httpx.Client(headers=headers) as client,
            client.stream(
                "POST", f"{url}/v1/completions", json=LONG | {"stream": True, "n": 8}
            ) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: not is_up(port))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert reasons.count("length") == 8
        assert process.wait(10) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    events = [record["event"] for record in records]
    assert "serving" in events
    assert "draining" in events
    assert records[events.index("serving")]["url"] == url
    [asked] = [r for r in records if r["event"] == "request" and r["request_id"] == "mine"]
    assert (asked["status"], asked["completion_tokens"]) == (200, 8 * 240)
    assert "Once upon" not in log.read_text(), "prompts are nobody's business"


def test_killed_and_back_while_a_client_retries(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    with started(log, port, ("--log-prompts",)) as process:
        until(lambda: is_up(port), 60)
        before = post(url, "/v1/completions", body).json()["choices"]
        process.kill()
        process.wait()
    assert 'prompt="Once upon a time"' in log.read_text()
    start = time.monotonic()
    with started(log, port) as process:
        after: Any = None
        while after is None and time.monotonic() - start < 60:
            try:
                after = post(url, "/v1/completions", body).json()["choices"]
            except httpx.TransportError:
                time.sleep(0.05)
        assert after == before
        # Two signals while something runs: it ends at once, whatever still runs.
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=LONG | {"n": 16, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: not is_up(port))
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 128 + signal.SIGTERM


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        start = time.monotonic()
        refuses(
            run("serve", "zoo:parley", "--port", port), [f"port={port}", "another --host or --port"]
        )
        assert time.monotonic() - start < 5


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
