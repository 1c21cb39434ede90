"""What Prometheus is told: vLLM's names behind a prefix, and what trees add to them.

Requests are observed by the event loop as their outputs arrive; the engine's own counts are read
when somebody asks, so that counting costs a step nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from specinfer.async_llm import StepUpdate
from specinfer.engine.engine import Engine
from specinfer.engine.stats import PARTS
from specinfer.outputs import RequestOutput

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 10.0),
)
_REQUEST_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
_TOKENS = tuple(float(base * 10**power) for power in range(5) for base in (1, 2, 5))
_NODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """All metrics of one server.

    registry  what `/metrics` shows
    """

    def __init__(self, engine: Engine, model_name: str, prefix: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engine, model_name, prefix))

        def histogram(name: str, meaning: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(
                prefix + name, meaning, ["model_name"], buckets=[*buckets], registry=self.registry
            )
            return made.labels(model_name)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            names = ["model_name", *labels]
            return Counter(prefix + name, meaning, names, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_S
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds",
            "Time per token after the first, as it came: a step's tokens share its time.",
            _TOKEN_S,
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            _TOKEN_S,
        )
        self.request = histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_S
        )
        self.queue = histogram(
            "request_queue_time_seconds", "Arrival to first computation.", _FIRST_TOKEN_S
        )
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = histogram(
            "request_generation_tokens", "Tokens of a continuation.", _TOKENS
        )
        self._prompt_total = counter("prompt_tokens", "Tokens of prompts that were computed.")
        self._success = counter(
            "request_success", "Continuations that ended, by how.", "finished_reason"
        )
        self._responses = counter("http_requests", "Answers, by path and status.", "path", "status")
        self._model_name = model_name

    def count_prompt(self, num_tokens: int) -> None:
        """Count a prompt whose first token has come."""
        self._prompt_total.labels(self._model_name).inc(num_tokens)
        self.prompt_tokens.observe(num_tokens)

    def count_end(self, reason: str) -> None:
        """Count a continuation that ended."""
        self._success.labels(self._model_name, reason).inc()

    def count_response(self, path: str, status: int) -> None:
        """Count an answer."""
        self._responses.labels(self._model_name, path, str(status)).inc()


@dataclass(slots=True)
class _Progress:
    """One prompt's continuations, as the clock saw them."""

    first_s: float
    last_s: float
    num_tokens: int
    output: RequestOutput


class Timeline:
    """One request's times, told to the metrics as its updates come.

    num_prompts  of num_samples continuations each
    """

    def __init__(
        self, metrics: Metrics, arrival_s: float, num_prompts: int, num_samples: int
    ) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._num_prompts = num_prompts
        self._num_samples = num_samples
        self._prompts: dict[int, _Progress] = {}

    def observe(self, update: StepUpdate) -> None:
        """Take an update in."""
        metrics, now = self._metrics, update.time_s
        num_tokens = update.output.stats.num_output_tokens
        progress = self._prompts.get(update.index)
        if progress is None:
            progress = _Progress(now, now, num_tokens, update.output)
            self._prompts[update.index] = progress
            metrics.first_token.observe(now - self._arrival_s)
            metrics.count_prompt(len(update.output.prompt_token_ids))
            if update.scheduled_s is not None:
                metrics.queue.observe(max(0.0, update.scheduled_s - self._arrival_s))
        else:
            # Samples advance together: the gap is each one's, and what came after it shares it.
            num_new = num_tokens - progress.num_tokens
            if num_new:
                gap = (now - progress.last_s) * self._num_samples / num_new
                for _ in range(num_new):
                    metrics.between_tokens.observe(gap)
            progress.last_s, progress.num_tokens = now, num_tokens
        progress.output = update.output
        if update.output.finished:
            self._end(update, progress)

    def close(self) -> None:
        """Count what was left before its end."""
        for _ in range((self._num_prompts - len(self._prompts)) * self._num_samples):
            self._metrics.count_end("abort")
        for progress in self._prompts.values():
            if not progress.output.finished:
                for each in progress.output.outputs:
                    self._metrics.count_end(each.finish_reason or "abort")

    def _end(self, update: StepUpdate, progress: _Progress) -> None:
        metrics = self._metrics
        metrics.request.observe(update.time_s - self._arrival_s)
        for each in update.output.outputs:
            metrics.count_end(each.finish_reason or "abort")
            metrics.output_tokens.observe(len(each.token_ids))
        per_sample = progress.num_tokens / self._num_samples
        if per_sample > 1:
            metrics.per_token.observe((progress.last_s - progress.first_s) / (per_sample - 1))


class _EngineCollector(Collector):
    """The engine's counts at the moment of asking.

    They belong to another thread: numbers are read as they are, dictionaries copied in one go.
    """

    def __init__(self, engine: Engine, model_name: str, prefix: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is shows when it is collected."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Everything."""
        yield from self._gauges()
        yield from self._tokens()
        yield from self._speculation()
        yield from self._steps()

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, meaning, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, meaning, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counters(
        self, name: str, meaning: str, label: str, values: Iterable[tuple[str, float]]
    ) -> Metric:
        family = CounterMetricFamily(self._prefix + name, meaning, labels=["model_name", label])
        for key, value in values:
            family.add_metric([self._model_name, key], value)
        return family

    def _gauges(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        yield self._gauge("num_requests_running", "Being computed.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Waiting for a place.", len(scheduler.waiting))
        yield self._gauge("kv_cache_usage_perc", "1: all pages are in use.", scheduler.usage)

    def _tokens(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield self._counter("generation_tokens", "Tokens emitted.", stats.num_output_tokens)
        yield self._counter(
            "target_tokens",
            "Tokens the target computed: prompts, roots and drafted nodes.",
            stats.num_target_tokens,
        )
        yield self._counter(
            "prefix_cache_queries",
            "Prompt tokens looked for in the cache.",
            stats.num_prefix_queries,
        )
        yield self._counter("prefix_cache_hits", "Those that were there.", stats.num_prefix_hits)
        yield self._counter(
            "num_preemptions",
            "Times a sequence gave its pages up, to be computed again.",
            stats.num_preemptions,
        )

    def _speculation(self) -> Iterator[Metric]:
        stats, sums = self._engine.stats, self._engine.stats.sums
        yield self._counter(
            "spec_decode_num_drafts", "Steps of a sequence that had a tree.", sums.num_drafts
        )
        yield self._counter(
            "spec_decode_num_draft_tokens", "Drafted nodes the target scored.", sums.num_drafted
        )
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens emitted.", sums.num_accepted
        )
        places = [(str(depth), count) for depth, count in enumerate(list(sums.accepted_by_depth))]
        yield self._counters(
            "spec_decode_num_accepted_tokens_per_pos",
            "The same by depth, the first one 0.",
            *("position", places),
        )
        yield self._counters(
            "spec_decode_num_draft_tokens_per_pos",
            "Drafted nodes by depth, the first one 0.",
            "position",
            [(str(d), n) for d, n in enumerate(list(stats.drafted_by_depth))],
        )
        yield self._counters(
            "spec_decode_num_draft_tokens_by_source",
            "Drafted nodes by the drafter that was the first to propose them.",
            *("source", dict(stats.drafted_by_source).items()),
        )
        yield self._counters(
            "spec_decode_num_accepted_tokens_by_source",
            "Accepted tokens by the drafter that was the first to propose them.",
            *("source", dict(sums.accepted_by_source).items()),
        )
        steps = max(1, sums.num_target_steps)
        yield self._gauge(
            "spec_decode_block_efficiency",
            "Tokens per step of a sequence since the start; plain decoding is 1.",
            stats.num_output_tokens / steps if sums.num_target_steps else 1.0,
        )
        yield self._counter(
            "sequence_steps", "Steps of a sequence that emitted.", sums.num_target_steps
        )

    def _steps(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield self._counter("engine_steps", "Steps of the engine.", stats.num_steps)
        yield self._counters(
            "step_time_seconds",
            "Time of steps by part.",
            "part",
            [(part, stats.seconds[part]) for part in PARTS],
        )
        counts = dict(stats.steps_by_nodes)
        nodes = HistogramMetricFamily(
            self._prefix + "step_tree_nodes",
            "Nodes drafted in a step, as the controller chose, for all its sequences.",
            labels=["model_name"],
        )
        buckets = [
            (str(float(bound)), sum(n for size, n in counts.items() if size <= bound))
            for bound in _NODES
        ]
        total = sum(counts.values())
        nodes.add_metric(
            [self._model_name],
            [*buckets, ("+Inf", total)],
            sum_value=sum(size * n for size, n in counts.items()),
        )
        yield nodes
        drafters = [each.name for each in self._engine.speculator.drafters]
        failed = dict(stats.failed_drafters)
        yield self._counters(
            "drafter_failures",
            "Drafters that raised and are asked no more.",
            "drafter",
            [(name, float(name in failed)) for name in drafters],
        )
