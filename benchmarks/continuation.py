"""What a system wrote for one prompt, and when: what all peers have in common.

A system's name is `peer/precision/way`, such as `llama.cpp/q8_0/chain-5`; a peer knows its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from specinfer.errors import ConfigError


@dataclass(slots=True)
class Continuation:
    """One prompt's continuation.

    bursts  (seconds since the call, tokens that came), in order; the first one ends the prompt
    tokens  the token ids, or text where only that is known
    """

    bursts: list[tuple[float, int]]
    tokens: list[int] | str

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.bursts[0][0]


Continue = Callable[[Sequence[Sequence[int]], int, float], list[Continuation]]
"""Continues prompts of token ids, together, by so many tokens at this temperature."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What every system is asked for.

    target, drafter  checkpoint folders
    batch            prompts at a time
    """

    target: Path
    drafter: Path
    threads: int
    batch: int


class Peer(Protocol):
    """A system in all its ways to decode."""

    @property
    def name(self) -> str:
        """The first part of its systems' names."""

    def ways(self) -> list[str]:
        """Those it is measured in unless asked otherwise, as `precision/way`."""

    def open(self, precision: str, way: str) -> Continue:
        """Load what is needed; what was loaded for one way serves others too.

        raises  SpecInferError where it cannot be had: not installed, not built, not offered
        """

    def close(self) -> None:
        """End the processes it started."""

    def version(self) -> str:
        """Its version, and of settings what is not obvious."""


def chain_length(way: str) -> int | None:
    """5 for `chain-5`, None for another way.

    raises  ConfigError for a chain of no length
    """
    if not way.startswith("chain-"):
        return None
    length = way.removeprefix("chain-")
    if not length.isdecimal() or not int(length):
        raise ConfigError(f"way={way!r}: give a number of drafted tokens, such as chain-5")
    return int(length)


def unknown(peer: str, precision: str, way: str) -> ConfigError:
    """The error for a way that a peer does not have."""
    return ConfigError(f"{peer} has no {precision}/{way}")


def decode_rate(batch: Sequence[Continuation]) -> float:
    """Tokens per second while all of a batch decode.

    From when the last of them got its first token to when the first of them was done: no loading,
    no prompt, and nobody who waits or has ended.
    raises  ValueError if there is no such time
    """
    start_s = max(each.first_s for each in batch)
    end_s = min(each.bursts[-1][0] for each in batch)
    if end_s <= start_s:
        raise ValueError("one continuation ended before another began: ask for more tokens")
    num_tokens = sum(
        num for each in batch for when_s, num in each.bursts[1:] if start_s < when_s <= end_s
    )
    return num_tokens / (end_s - start_s)


def prompt_rate(continuation: Continuation, prompt: Sequence[int]) -> float:
    """Prompt tokens per second, up to the first token of the answer."""
    return len(prompt) / continuation.first_s
