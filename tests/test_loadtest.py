"""`specinfer bench serve` against a server whose delays are known, and against ours."""

import asyncio
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specinfer.errors import ConfigError
from specinfer.loadtest.client import Record
from specinfer.loadtest.plan import LoadTest, read_goals
from specinfer.loadtest.prompts import bundled_prompts, choose, read_prompts
from specinfer.loadtest.run import arrivals
from specinfer.loadtest.run import run as send
from specinfer.loadtest.summary import summarise
from tests.command_line import refuses, run
from tests.fake_openai import fake_server
from tests.serving import MODEL, pair, service_of, serving


def bench(url: str, *flags: str, exit_code: int = 0) -> dict[str, Any]:
    """Run it; the JSON it writes."""
    result = run("bench", "serve", "--base-url", url, "--json", "-", *flags)
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# --- against known delays -------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_known_delays_are_found(endpoint: str) -> None:
    with fake_server(first_s=0.2, gap_s=0.05, tokens_per_chunk=3) as (url, fake):
        found = bench(url, "--num-prompts", "8", "--endpoint", endpoint)
    assert (found["completed"], found["failed"], found["model"]) == (8, 0, "fake")
    assert found["total_output_tokens"] == 8 * 15
    assert found["total_input_tokens"] == 8 * 7
    # No sleep ends early; how late it is heard of is bounded by sums, not by a busy machine's clock
    for name, low_ms in (("ttft", 200), ("e2el", 400)):
        for statistic in ("mean", "p50", "p90"):
            assert found[f"{statistic}_{name}_ms"] >= low_ms * 0.98, name
    ttft, itl, tpot, e2el = (found[f"mean_{n}_ms"] for n in ("ttft", "itl", "tpot", "e2el"))
    assert ttft + 4 * itl == pytest.approx(e2el, rel=1e-3)  # gaps of chunks, after the first text
    assert ttft + 14 * tpot == pytest.approx(e2el, rel=1e-3)  # time per token of three in each
    assert e2el < found["duration"] * 1e3
    assert found["output_throughput"] == pytest.approx(120 / found["duration"])
    assert found["request_throughput"] == pytest.approx(8 / found["duration"])
    assert len(fake.bodies) == 8


def test_what_fails_is_counted_and_not_timed() -> None:
    fails = {1: "503", 3: "broken", 4: "error", 6: "nothing"}
    with fake_server(fails=fails) as (url, _):
        found = bench(url, "--num-prompts", "7", "--max-concurrency", "1")
    assert (found["completed"], found["failed"]) == (3, 4)
    assert sorted(found["errors"].values()) == [1, 1, 1, 1]
    told = " ".join(found["errors"])
    for words in ("HTTP 503", "too many requests", "broke off", "the engine failed", "no choices"):
        assert words in told
    assert found["total_output_tokens"] == 3 * 5
    assert [error is None for error in found["request_errors"]] == [1, 0, 1, 0, 0, 1, 0]


def test_all_failing_is_exit_code_1() -> None:
    with fake_server(fails=dict.fromkeys(range(3), "503")) as (url, _):
        found = bench(url, "--num-prompts", "3", exit_code=1)
        shown = run("bench", "serve", "--base-url", url, "--num-prompts", "2")
    assert (found["completed"], found["failed"], found["request_throughput"]) == (0, 3, 0)
    assert "2 completed" in shown.output  # it fails only three


def test_a_port_that_nobody_listens_on_is_one_sentence() -> None:
    with fake_server() as (url, _):
        pass
    refuses(run("bench", "serve", "--base-url", url), ["/v1/models", "--base-url"])
    found = bench(url, "--model", "any", "--num-prompts", "2", exit_code=1)
    assert "ConnectError" in next(iter(found["errors"]))


def test_never_more_at_a_time_than_asked() -> None:
    with fake_server(first_s=0.03, together=3) as (url, fake):
        found = bench(url, "--num-prompts", "12", "--max-concurrency", "3")
        assert fake.most == 3
    with fake_server(together=12) as (url, fake):
        bench(url, "--num-prompts", "12")
        assert fake.most == 12
    # Waiting for a place is not the server's: three at a time have three times the run in all
    assert 12 * found["mean_e2el_ms"] < 3 * found["duration"] * 1e3


def test_requests_come_however_slow_the_server_is() -> None:
    with fake_server(together=10) as (url, fake):
        bench(url, "--num-prompts", "10", "--request-rate", "40", "--seed", "3")
    assert fake.most == 10


def test_requests_are_sent_at_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def ask(prompt: Any) -> Any:
        return prompt

    stopped = SimpleNamespace(perf_counter=lambda: 100.0)
    waiting = SimpleNamespace(**vars(asyncio) | {"sleep": sleep})
    monkeypatch.setattr("specinfer.loadtest.run.time", stopped)
    monkeypatch.setattr("specinfer.loadtest.run.asyncio", waiting)
    at_s = arrivals(10, 40.0, seed=3)
    assert asyncio.run(send(ask, range(10), at_s)) == (list(range(10)), 0.0)  # type: ignore[arg-type]
    assert waited == pytest.approx(at_s)


def test_the_body_is_what_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "One\u2028line", "temperature": 0.5}\n{"prompt": "Two"}\n', "utf-8")
    with fake_server() as (url, fake):
        flags = ["--file", str(file), "--num-prompts", "2", "--max-concurrency", "1"]
        more = ["--temperature", "0", "--ignore-eos", "--max-tokens", "9", "--api-key", "secret"]
        found = bench(f"{url}/v1/", *flags, *more, "--extra-body", '{"top_k": 2}')
    assert "secret" not in json.dumps(found)
    assert all(headers["authorization"] == "Bearer secret" for headers in fake.headers)
    bodies = {body["messages"][0]["content"]: body for body in fake.bodies}
    assert bodies["One\u2028line"]["temperature"] == 0.5
    assert bodies["Two"]["temperature"] == 0
    for body in fake.bodies:
        assert (body["ignore_eos"], body["max_tokens"], body["top_k"]) == (True, 9, 2)
        assert body["stream_options"] == {"include_usage": True}


def test_without_usage_chunks_are_counted_and_it_says_so() -> None:
    with fake_server(has_usage=False, tokens_per_chunk=4) as (url, _):
        result = run("bench", "serve", "--base-url", url, "--num-prompts", "2")
    assert "10 out" in result.output
    assert "chunks were counted" in result.output


def test_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "latency.svg"
    goals = ("--goodput", "ttft:5000", "e2el:9000")
    with fake_server(gap_s=0.01) as (url, _):
        flags = ("--base-url", url, "--num-prompts", "4", "--plot", str(file))
        result = run("bench", "serve", *flags, *goals)
    assert result.exit_code == 0, result.output
    for words in ("(ttft)", "(tpot)", "(itl)", "(e2el)", "p99", "goodput", "4 completed"):
        assert words in result.output
    assert "</svg>" in file.read_text(encoding="utf-8")


def test_against_our_own_server() -> None:
    with closing(pair(max_model_len=128)) as llm, serving(service_of(llm)) as url:
        flags = ("--max-tokens", "12", "--ignore-eos", "--temperature", "0", "--goodput", "ttft:1")
        found = bench(url, "--num-prompts", "6", "--max-concurrency", "3", *flags)
    assert found["model"] == MODEL
    assert (found["completed"], found["total_output_tokens"]) == (6, 72)
    assert 6 <= found["num_chunks"] <= 72
    assert found["request_goodput"] <= found["request_throughput"]


# --- what is computed -----------------------------------------------------------------------------


def record(ttft_s: float, tpot_s: float, tokens: int = 11, error: str | None = None) -> Record:
    end_s = 1.0 + ttft_s + tpot_s * (tokens - 1)
    gaps = [tpot_s] * (tokens - 1)
    done = Record(1.0, 1.0 + ttft_s, end_s, end_s, gaps, tokens, 5, tokens, True, error)
    assert tokens < 2 or done.tpot_s == pytest.approx(tpot_s)
    return done


def test_goodput_counts_requests_that_meet_every_goal() -> None:
    records = [
        record(0.1, 0.01),
        record(0.3, 0.01),  # late
        record(0.1, 0.05),  # slow
        record(0.1, 0.01, error="HTTP 500"),
        record(0.1, 0.01, tokens=1),  # has no time per token to miss
    ]
    goals = {"ttft": 200.0, "tpot": 20.0}
    assert summarise(records, 2.0, goals).goodput == 1.0
    assert summarise(records, 2.0, {"ttft": 200.0}).goodput == 1.5
    assert summarise(records, 2.0, {"e2el": 190.0}).goodput == 0.5
    assert summarise(records, 2.0, {}).goodput is None


def test_percentiles_are_numpys_over_what_succeeded() -> None:
    rng = np.random.default_rng(0)
    times_s = rng.exponential(0.1, 200)
    records = [record(t, 0.01) for t in times_s] + [record(99.0, 9.0, error="gone")]
    found = summarise(records, 1.0, {}).latencies["ttft"]
    for name, q in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert found[name] == pytest.approx(1e3 * np.percentile(times_s, q))
    assert found["mean"] == pytest.approx(1e3 * times_s.mean())


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(arrivals(20_000, 50.0, seed=1))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() == pytest.approx(50, rel=0.2)
    assert arrivals(5, 50.0, seed=1) == times[:5].tolist()
    assert arrivals(3, float("inf"), seed=1) == [0, 0, 0]


def test_prompts_from_every_kind_of_file(tmp_path: Path) -> None:
    def read(name: str, text: str) -> list[list[dict[str, str]]]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [[dict(each) for each in p.messages] for p in read_prompts(tmp_path / name)]

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    assert read("a.txt", "One\n\n{two}\n") == [ask("One"), ask("{two}")]
    rows = [
        {"prompt": "One"},
        {"turns": ["Two", "Three"]},
        {"messages": [*ask("Four"), {"role": "assistant", "content": "Five"}]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert read("a.jsonl", lines) == [ask("One"), ask("Two"), ask("Four")]
    turns = [{"from": "human", "value": "Six"}, {"from": "gpt", "value": "Seven"}]
    shared = [{"id": "x", "conversations": turns}, {"conversations": turns[1:]}]
    assert read("a.json", json.dumps(shared)) == [ask("Six")]
    for name, text in (
        ("b.txt", "\n"),
        ("b.jsonl", "{"),
        ("c.jsonl", '{"question": "?"}'),
        ("d.jsonl", '{"prompt": 3}'),
        ("e.json", "[4]"),
    ):
        with pytest.raises(ConfigError, match=name):
            read(name, text)
    with pytest.raises(ConfigError, match="missing"):
        read_prompts(tmp_path / "missing.txt")


def test_every_prompt_comes_once_before_one_comes_again() -> None:
    known = bundled_prompts()
    assert len({prompt.text for prompt in known}) == len(known) > 100
    chosen = [prompt.text for prompt in choose(known, 2 * len(known), seed=4)]
    assert len(set(chosen[: len(known)])) == len(known)
    assert chosen[: len(known)] == chosen[len(known) :]
    assert chosen != [prompt.text for prompt in choose(known, 2 * len(known), seed=5)]


def test_goals_are_read_as_vllm_has_them() -> None:
    assert read_goals(["ttft:200 tpot:20", "e2el:3e3"]) == {"ttft": 200, "tpot": 20, "e2el": 3000}
    for wrong in ("itl:3", "ttft", "ttft:-1", "ttft:x", "ttft:1 ttft:2"):
        with pytest.raises(ConfigError, match="goodput"):
            read_goals([wrong])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--endpoint", "embeddings"], ["endpoint='embeddings'", "chat or completions"]),
        (["--request-rate", "0"], ["request_rate=0", "above 0"]),
        (["--num-prompts", "0"], ["num_prompts=0"]),
        (["--base-url", "localhost:8000"], ["base_url", "http://"]),
        (["--extra-body", "[1]"], ["extra_body", "object"]),
        (["ttft:3"], ["ttft:3", "options alone"]),
        (["--goodput", "ttft"], ["goodput='ttft'", "MILLISECONDS"]),
        (["--plot", "latency.xyz"], ["latency.xyz", ".png"]),
        (["--json", "nowhere/at/all.json"], ["nowhere/at/all.json"]),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_asked(
    flags: list[str], words: list[str]
) -> None:
    refuses(run("bench", "serve", *flags), words)


def test_a_load_test_made_in_python_is_checked_as_well() -> None:
    assert LoadTest(goodput=["ttft:3"]).goals_ms == {"ttft": 3.0}
    with pytest.raises(ConfigError, match="timeout_s"):
        LoadTest(timeout_s=0)
