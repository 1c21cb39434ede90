"""Side-by-side measurement: shared machines drift, so only ratios of neighbours mean anything.

Every prompt goes through every system before the next prompt does, in an order that turns with each
prompt; what is compared are the two runs of one prompt.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

System = Callable[[Sequence[int]], int]
"""Continues a prompt of token ids and returns how many tokens it wrote."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def measure(
    systems: Mapping[str, System], prompts: Sequence[Sequence[int]], *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time every system on every prompt, alternating.

    warm_up  prompts run, untimed, through every system first
    returns  per system its tokens per second on each prompt
    """

    def timed(system: System) -> Callable[[Sequence[int]], float]:
        def run(prompt: Sequence[int]) -> float:
            start = time.perf_counter()
            num_tokens = system(prompt)
            return num_tokens / (time.perf_counter() - start)

        return run

    rated = {name: timed(system) for name, system in systems.items()}
    return alternate(rated, prompts, warm_up=warm_up)


def alternate(
    systems: Mapping[str, Callable[[T], float]], inputs: Sequence[T], *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Ask every system, which does its own timing, about every input, in turns.

    warm_up  inputs of which the answers do not count, asked first
    returns  per system what it answered to each input
    """
    names = list(systems)
    for each in inputs[:warm_up]:
        for name in names:
            systems[name](each)
    answers: dict[str, list[float]] = {name: [] for name in names}
    for turn, each in enumerate(inputs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            answers[name].append(systems[name](each))
    return answers


def ratio(rates: Mapping[str, Sequence[float]], name: str, base: str) -> Spread:
    """How many times faster one system is than another, paired by prompt."""
    return Spread.of([a / b for a, b in zip(rates[name], rates[base], strict=True)])
