"""`scripts/soak` for some seconds, and that it sees what it is there to see."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.hostile import BROKEN, Answer, Job, ask, send_broken
from benchmarks.server_process import find_errors
from benchmarks.soak import Findings, settle

ROOT = Path(__file__).parent.parent
JOB = Job(
    messages=[{"role": "user", "content": "Hello"}],
    prompt=None,
    fields={"temperature": 0.0, "max_tokens": 4},
    is_stream=False,
    text="Hello to you.",
    finish_reason="stop",
)


def test_some_seconds_of_hostile_clients_violate_nothing() -> None:
    command = ["scripts/soak", "--seconds", "3", "--clients", "32", "--jobs", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same as offline" in done.stdout


def kinds(findings: Findings) -> list[str]:
    return [each.split(":")[0] for each in findings.violations]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("Hello to you.", "stop"), []),
        (Answer("Hello to me.", "stop"), ["differs"]),
        (Answer("Hello to you.", "length"), ["differs"]),
        (Answer("Hello", "", "the stream broke off"), ["failed"]),
    ],
)
def test_answers_are_compared(answer: Answer, expected: list[str]) -> None:
    findings = Findings()
    findings.judge_answer(JOB, answer)
    assert kinds(findings) == expected


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"error": {"message": "no such field"}}, []),
        (400, {"detail": "no such field"}, ["not refused"]),
        (200, {"choices": []}, ["not refused"]),
        (500, {"error": {"message": "the engine failed"}}, ["not refused"]),
        (0, "ReadError()", ["not refused"]),
    ],
)
def test_broken_bodies_must_be_refused(status: int, body: Any, expected: list[str]) -> None:
    findings = Findings()
    findings.judge_refusal("a list", status, body)
    assert kinds(findings) == expected


def test_growing_memory_is_seen_and_a_warm_up_is_not() -> None:
    def growth_of(rss: list[float]) -> list[str]:
        findings = Findings(rss_bytes=[(float(at), int(b * 1e6)) for at, b in enumerate(rss)])
        findings.judge_memory(seconds=600)
        return kinds(findings)

    assert growth_of([100.0 + 10 * i for i in range(240)] + [2500.0] * 360) == []
    assert growth_of([500.0] * 240 + [500.0 + i / 6 for i in range(360)]) == ["memory"]
    assert growth_of([500.0] * 240 + [500.0 + i / 60 for i in range(360)]) == []
    assert growth_of([500.0]) == ["memory"]
    assert Findings().judge_memory(seconds=599) is None


def test_a_soak_without_pressure_is_none() -> None:
    findings = Findings(waiting=3)
    findings.counts.update(survived=1, disconnected=1, broken=1)
    findings.judge_pressure()
    assert kinds(findings) == []
    findings.waiting = 0
    findings.counts["broken"] = 0
    findings.judge_pressure()
    assert kinds(findings) == ["no pressure", "no traffic"]


@pytest.mark.parametrize(
    ("line", "is_bad"),
    [
        ('{"level": "info", "event": "request", "path": "/Exception"}', False),
        ('{"level": "error", "event": "a step failed"}', True),
        ('{"level": "warning", "event": "slow", "exception": "Traceback …"}', True),
        ("Traceback (most recent call last):", True),
        ("Task exception was never retrieved", True),
        ("", False),
    ],
)
def test_trouble_is_found_in_a_log(line: str, is_bad: bool) -> None:
    assert bool(find_errors(f'{{"event": "serving"}}\n{line}\n')) == is_bad


def test_a_server_that_is_gone_is_a_violation() -> None:
    class Gone:
        async def metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
            raise httpx.ConnectError("nobody listens")

    findings = Findings()
    asyncio.run(settle(Gone(), findings))  # type: ignore[arg-type]
    assert kinds(findings) == ["gone"]


class _Lying:
    """A server that is never quiet."""

    url = "http://nowhere"

    async def metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        counts = {"num_requests_running": 0.0, "num_requests_waiting": 0.0}
        return counts | {"kv_cache_usage_perc": 0.01}


def test_a_page_that_stays_in_use_is_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak._SETTLING_S", 0.2)
    findings = Findings()
    asyncio.run(settle(_Lying(), findings))  # type: ignore[arg-type]
    assert kinds(findings) == ["leak"]


def test_what_servers_answer_is_read() -> None:
    async def chat(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError:
            return JSONResponse({"error": {"message": "no JSON"}}, 400)
        message = {"role": "assistant", "content": body["messages"][0]["content"] + " to you."}
        return JSONResponse({"choices": [{"message": message, "finish_reason": "stop"}]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])

    async def talk() -> tuple[Answer, tuple[int, Any]]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
            return await ask(http, JOB), await send_broken(http, dict(BROKEN)["nothing"] or b"")

    answer, refusal = asyncio.run(talk())
    assert (answer.text, answer.finish_reason, answer.error) == (JOB.text, "stop", None)
    assert refusal == (400, {"error": {"message": "no JSON"}})
