"""What a load test found, in the names of `vllm bench serve`.

ttft  time to first token            itl   inter-token latency: between two chunks
tpot  time per output token          e2el  end-to-end latency
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specinfer.loadtest.client import Record

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Summary:
    """One test.

    errors      how often each failure came
    num_chunks  with text, of the requests that succeeded
    goodput     requests per second that met every goal; None without goals
    latencies   name → {"mean", "p50", "p90", "p99"} in milliseconds; left out where nothing was
                measured
    is_counted  whether the server counted all tokens itself
    """

    completed: int
    failed: int
    errors: dict[str, int]
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    num_chunks: int
    goodput: float | None
    latencies: dict[str, dict[str, float]]
    is_counted: bool

    @property
    def request_throughput(self) -> float:
        """Requests that succeeded, per second."""
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Tokens written per second."""
        return self.total_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """Tokens read and written per second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration_s

    def to_object(self) -> dict[str, Any]:
        """As vLLM's result file has it: flat, `mean_ttft_ms` and so on."""
        latencies = {
            f"{statistic}_{name}_ms": value
            for name, values in self.latencies.items()
            for statistic, value in values.items()
        }
        return {
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "errors": self.errors,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "num_chunks": self.num_chunks,
            "request_throughput": self.request_throughput,
            "request_goodput": self.goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            **latencies,
        }


def summarise(records: Sequence[Record], duration_s: float, goals: Mapping[str, float]) -> Summary:
    """Add up what became of all requests; latencies are those of the ones that succeeded."""
    done = [record for record in records if record.error is None]
    num_good = sum(_meets(record, goals) for record in done)
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(r.error for r in records if r.error is not None).most_common()),
        duration_s=duration_s,
        total_input_tokens=sum(record.prompt_tokens for record in done),
        total_output_tokens=sum(record.output_tokens for record in done),
        num_chunks=sum(record.num_chunks for record in done),
        goodput=num_good / duration_s if goals else None,
        latencies={
            name: _statistics(values) for name, values in samples_s(records).items() if values
        },
        is_counted=all(record.has_usage for record in done),
    )


def samples_s(records: Sequence[Record]) -> dict[str, list[float]]:
    """Every latency of the requests that succeeded, in seconds."""
    done = [record for record in records if record.error is None]
    return {
        "ttft": [record.ttft_s for record in done],
        "tpot": [record.tpot_s for record in done if record.tpot_s is not None],
        "itl": [gap for record in done for gap in record.gaps_s],
        "e2el": [record.e2el_s for record in done],
    }


def _statistics(values_s: Sequence[float]) -> dict[str, float]:
    import numpy as np

    values_ms = 1e3 * np.asarray(values_s)
    percentiles = np.percentile(values_ms, PERCENTILES).tolist()
    names = [f"p{each}" for each in PERCENTILES]
    return {"mean": float(values_ms.mean())} | dict(zip(names, percentiles, strict=True))


def _meets(record: Record, goals: Mapping[str, float]) -> bool:
    took_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all(1e3 * took_s[name] <= limit_ms for name, limit_ms in goals.items())
