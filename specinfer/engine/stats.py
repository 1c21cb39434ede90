"""Where a step's time goes, and how many tokens came of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from specinfer.draft.base import Draft, Drafter, Pick

PARTS = ("schedule", "draft", "grow", "target", "verify", "commit")
"""draft: the drafters' passes; grow: making trees of what they said; target: the target's pass."""

HOST_PARTS = ("schedule", "grow", "verify", "commit")
"""What is neither model's pass."""


class Pass(NamedTuple):
    """One drafter pass: how many nodes it was asked about, of how many sequences.

    num_tokens  computed: the nodes, and committed tokens the drafter had to catch up with
    """

    source: int
    num_nodes: int
    num_spans: int
    num_tokens: int
    seconds: float


@dataclass(slots=True)
class EngineStats:
    """Sums since the engine started, or since `reset`.

    num_steps          steps that computed something
    num_target_tokens  tokens the target computed: prompt chunks, roots and drafted nodes
    num_output_tokens  tokens emitted
    num_preemptions    times a running sequence gave its pages up and was computed again
    num_prefix_queries prompt tokens of admitted sequences, and num_prefix_hits of them whose K and
                       V were there already
    num_goals          requests that ended with a latency goal, and num_goals_met of them in time
    num_running, num_waiting      sequences, now
    num_blocks, num_blocks_used   blocks of the cache, and those that somebody refers to, now
    passes             the drafters' passes of the last step
    seconds            per part of a step; a part inside a part counts once, as the inner one
    """

    num_steps: int = 0
    num_target_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_goals: int = 0
    num_goals_met: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    passes: list[Pass] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _nested_s: float = 0.0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to a part."""
        outer_s, self._nested_s = self._nested_s, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self._nested_s
            self._nested_s = outer_s + elapsed

    def reset(self) -> None:
        """Start counting again."""
        self.num_steps = self.num_target_tokens = self.num_output_tokens = 0
        self.num_preemptions = self.num_prefix_queries = self.num_prefix_hits = 0
        self.num_goals = self.num_goals_met = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def host_share(self) -> float:
        """The part of all time that went to neither model's pass."""
        total = sum(self.seconds.values())
        return sum(self.seconds[part] for part in HOST_PARTS) / total if total else 0.0


class TimedDrafter:
    """A drafter whose passes count as "draft", wherever they are called from."""

    def __init__(self, drafter: Drafter, source: int, stats: EngineStats) -> None:
        self._source = source
        self.name = drafter.name
        self.max_positions = drafter.max_positions
        self._drafter = drafter
        self._stats = stats

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor | list[list[Pick]]:
        """See `Drafter.expand`."""
        start = time.perf_counter()
        with self._stats.timed("draft"):
            answer = self._drafter.expand(frontier)
        num_nodes = sum(len(nodes) for _, nodes in frontier)
        num_tokens = getattr(self._drafter, "num_fed", num_nodes)  # drafters without a model: none
        seconds = time.perf_counter() - start
        self._stats.passes.append(Pass(self._source, num_nodes, len(frontier), num_tokens, seconds))
        return answer

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`."""
        self._drafter.admit(accepted)

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        self._drafter.drop(key)
