"""Metrics: what they count, their names, and that the dashboard asks for nothing else."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import State

from specinfer.async_llm import AsyncLLM
from specinfer.errors import RequestError
from specinfer.request import SamplingParams
from specinfer.serve.state import Service
from tests.serving import CLIENT, MODEL, Held, pair, post, service_of, serving

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
VLLM = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_time_per_output_token_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
    *("spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_per_pos_total"),
)


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = pair(drafters=["zoo:parley-draft", "ngram"])
    yield llm
    llm.close()


def scrape(url: str) -> dict[str, dict[tuple[Any, ...], float]]:
    """Samples by name, by their labels without the model's name."""
    text = CLIENT.get(f"{url}/metrics").text
    found: dict[str, dict[tuple[Any, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith(("process_", "python_")):
                assert labels.pop("model_name") == MODEL
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
    return found


def test_counts_are_those_of_the_requests(llm: AsyncLLM) -> None:
    llm.llm.engine.stats.reset()
    with serving(service_of(llm)) as url:
        body = {"prompt": ["Once upon a time", "Hello"], "max_tokens": 12, "temperature": 0}
        answer = post(url, "/v1/completions", body | {"include_metrics": True, "n": 2}).json()
        post(url, "/v1/completions", body | {"foo": 1})
        told = scrape(url)
    usage, speculation = answer["usage"], answer["metrics"]["speculative_decoding"]

    def value(name: str, **labels: str) -> float:
        return told[f"specinfer:{name}"][tuple(sorted(labels.items()))]

    assert value("prompt_tokens_total") == usage["prompt_tokens"]
    assert value("generation_tokens_total") == usage["completion_tokens"]
    ends: dict[str, int] = {}
    for choice in answer["choices"]:
        ends[choice["finish_reason"]] = ends.get(choice["finish_reason"], 0) + 1
    for reason, count in ends.items():
        assert value("request_success_total", finished_reason=reason) == count
    assert value("time_to_first_token_seconds_count") == 2
    assert value("request_queue_time_seconds_count") == 2
    assert value("e2e_request_latency_seconds_count") == 2
    assert value("e2e_request_latency_seconds_sum") > value("time_to_first_token_seconds_sum") > 0
    between = value("inter_token_latency_seconds_count")
    assert 0 < between <= usage["completion_tokens"] - 2
    assert value("spec_decode_num_drafts_total") == speculation["num_spec_steps"]
    assert value("spec_decode_num_draft_tokens_total") == speculation["num_draft_tokens"] > 0
    accepted = speculation["num_accepted_draft_tokens"]
    assert value("spec_decode_num_accepted_tokens_total") == accepted
    for name in ("accepted", "draft"):
        total = value(f"spec_decode_num_{name}_tokens_total")
        for kind in ("per_pos", "by_source"):
            assert (
                sum(told[f"specinfer:spec_decode_num_{name}_tokens_{kind}_total"].values()) == total
            )
    assert value("num_requests_running") == value("kv_cache_usage_perc") == 0
    assert value("step_time_seconds_total", part="target") > 0
    assert value("engine_steps_total") == value("step_tree_nodes_count") > 0
    assert value("step_tree_nodes_sum") == speculation["num_draft_tokens"]
    assert value("drafter_failures_total", drafter="ngram") == 0
    assert value("spec_decode_block_efficiency") == pytest.approx(
        usage["completion_tokens"] / value("sequence_steps_total")
    )
    assert value("http_requests_total", path="/v1/completions", status="200") == 1
    assert value("http_requests_total", path="/v1/completions", status="400") == 1


def test_continuations_that_are_left_are_counted_each(llm: AsyncLLM) -> None:
    """Those of prompts that wait, too; and none of a request that is refused."""
    service = service_of(llm)

    async def leave() -> None:
        state = State({"note": {}, "arrival_s": time.perf_counter()})
        with pytest.raises(RequestError):
            await service.start([[1], []], SamplingParams(n=3), "refused", state)
        params = SamplingParams(n=3, max_tokens=200, ignore_eos=True)
        run = await service.start([[1], [2]], params, "left", state)
        await anext(run)
        run.close()

    asyncio.run(leave())
    with serving(service) as url:
        told = scrape(url)["specinfer:request_success_total"]
    assert told == {(("finished_reason", "abort"),): 6}


def test_gauges_while_it_runs(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(llm, monkeypatch, lambda steps: len(steps) == 3)
    with serving(service_of(llm)) as url, httpx.Client() as client:
        body = {"prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 3}
        body["speculation"] = {"tree": "off"}
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # kept: the connection closes with it
            next(lines)
            assert held.under_way.wait(60)
            told = scrape(url)
            held.go_on.set()
            assert told["specinfer:num_requests_running"][()] == 3
            assert 0 < told["specinfer:kv_cache_usage_perc"][()] < 1


def test_the_names_are_vllm_s_behind_any_prefix(llm: AsyncLLM) -> None:
    with serving(service_of(llm, metrics_prefix="vllm:")) as url:
        post(url, "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4})
        names = set(scrape(url))
    for name in VLLM:
        assert {f"vllm:{name}", f"vllm:{name}_bucket"} & names, name
    assert not [name for name in names if name.startswith("specinfer:")]


def exported(llm: AsyncLLM) -> set[str]:
    service: Service = service_of(llm)
    service.metrics.count_end("stop")
    service.metrics.count_response("/", 200)
    service.metrics.count_prompt(1)
    found = set()
    for family in service.metrics.registry.collect():
        found |= {sample.name for sample in family.samples} | {family.name}
        if family.type == "counter":
            found.add(f"{family.name}_total")
    return found


def test_the_dashboard_asks_only_for_what_there_is(llm: AsyncLLM) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    queries += [
        each["query"]["query"]
        for each in dashboard["templating"]["list"]
        if "query" in each and isinstance(each["query"], dict)
    ]
    assert len(queries) > 12
    names = exported(llm)
    for query in queries:
        asked = re.findall(r"[a-z]+:[a-z_0-9]+|process_[a-z_]+", query)
        assert asked, query
        assert set(asked) <= names, query


def test_every_metric_of_the_server_is_on_the_dashboard_or_named_here(llm: AsyncLLM) -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    families = [family.name for family in service_of(llm).metrics.registry.collect()]
    missing = {name for name in families if name not in text}
    assert missing <= {
        *("process_virtual_memory_bytes", "process_start_time_seconds", "process_cpu_seconds"),
        *("process_open_fds", "process_max_fds", "specinfer:engine_steps"),
        *("specinfer:target_tokens", "specinfer:request_prompt_tokens"),
        *("specinfer:request_generation_tokens", "specinfer:request_time_per_output_token_seconds"),
        *("specinfer:spec_decode_block_efficiency",),
    }
