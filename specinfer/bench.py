"""Latency measured fairly: systems take turns on every prompt.

Whatever else the machine does then meets all of them alike, and a ratio compares two runs that
stood side by side.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specinfer.request import RequestOutput, SamplingParams

SUBJECTS = (
    "Tell me a short story about a lost kite.",
    "I would like to book a table for two tonight.",
    "Write a fable about a fox and a river.",
    "Tom has 12 apples and gives away 5. How many are left?",
    "How do I list all files in a folder, newest first?",
    "I want to order a large pizza with mushrooms.",
)
"""What the bundled pair was trained to talk about, when no prompts are given."""


class System(Protocol):
    """Anything that continues prompts: an `LLM`, or a peer dressed as one."""

    def generate(
        self, prompts: list[list[int]], sampling_params: SamplingParams, /
    ) -> list[RequestOutput]:
        """Continue the prompts."""
        ...


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Run:
    """One system on one prompt, once."""

    prompt: int
    seconds: float
    num_tokens: int
    num_steps: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, the prompt's computation included."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """One system's runs, in the order in which they ran.

    ratio      this system's tokens per second over the first system's, paired run by run
    same_text  prompts on which its tokens were those of the first system
    """

    runs: list[Run]
    tokens_per_s: Spread
    tokens_per_step: float
    ratio: Spread
    same_text: int


@dataclass(frozen=True, slots=True)
class Latency:
    """What `measure_latency` found; the first system is what the others are compared with."""

    num_prompts: int
    pairs: int
    systems: dict[str, Measured] = field(default_factory=dict)


def measure_latency(
    llms: Mapping[str, System],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    pairs: int,
    *,
    report: Callable[[], None] = lambda: None,
) -> Latency:
    """Time every system on every prompt, one request at a time.

    pairs   how often each prompt is run by each system; who begins alternates
    report  called after each run
    cost    len(llms) * (pairs * len(prompts) + 1) generations: one each to warm up
    """
    assert llms
    assert prompts
    assert pairs > 0
    names = list(llms)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    tokens: dict[str, list[list[int]]] = {name: [] for name in names}
    for name in names:
        llms[name].generate([prompts[0]], params)
        report()
    for pair in range(pairs):
        for index, prompt in enumerate(prompts):
            turn = (pair + index) % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                [output] = llms[name].generate([prompt], params)
                seconds = time.perf_counter() - start
                stats = output.stats
                runs[name].append(
                    Run(index, seconds, stats.num_output_tokens, stats.num_target_steps)
                )
                if pair == 0:
                    tokens[name].append(output.outputs[0].token_ids)
                report()
    first = names[0]
    return Latency(
        len(prompts),
        pairs,
        {
            name: Measured(
                runs[name],
                Spread.of([run.tokens_per_s for run in runs[name]]),
                sum(run.num_tokens for run in runs[name])
                / sum(run.num_steps for run in runs[name]),
                Spread.of(
                    [
                        own.tokens_per_s / other.tokens_per_s
                        for own, other in zip(runs[name], runs[first], strict=True)
                    ]
                ),
                sum(own == other for own, other in zip(tokens[name], tokens[first], strict=True)),
            )
            for name in names
        },
    )
