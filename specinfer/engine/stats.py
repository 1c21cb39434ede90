"""Where a step's time goes, and how many tokens came of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from specinfer.outputs import RequestStats

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
class StepLoad:
    """What one step computed, and for how long.

    num_tokens   of the target: prompt chunks, roots and drafted nodes
    num_spans    sequences in the step
    num_emitted  tokens emitted
    num_nodes    drafted nodes
    passes       of the drafters
    target_s, host_s  seconds of the target's pass, and of neither model's
    """

    num_tokens: int
    num_spans: int
    num_emitted: int
    num_nodes: int
    passes: Sequence[Pass]
    target_s: float
    host_s: float


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
    num_places                    sequences that may run together, now: while the next in the queue
                                  has too little memory, those that do
    num_blocks, num_blocks_used   blocks of the cache, and those that somebody refers to, now
    sums               what speculation did, for all requests together
    steps_by_nodes     how many steps had so many drafted nodes, those of all sequences together
    drafted_by_source  per drafter's name, how many nodes it was the first to propose
    drafted_by_depth   entry d - 1: how many nodes were drafted at depth d
    failed_drafters    those that raised and are asked no more, and how
    passes             the drafters' passes of the last step
    seconds            per part of a step; a part inside a part counts once, as the inner one
    nested_s           of the part that is being timed, what parts inside it have taken so far
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
    num_places: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    sums: RequestStats = field(default_factory=RequestStats)
    steps_by_nodes: dict[int, int] = field(default_factory=dict)
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    drafted_by_depth: list[int] = field(default_factory=list)
    failed_drafters: dict[str, str] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    nested_s: float = 0.0

    def timed(self, part: str) -> "Timed":
        """Add the block's time to a part."""
        return Timed(self, part)

    def count_tree(self, depths: Sequence[int], sources: Sequence[str]) -> None:
        """Count a tree's drafted nodes: how deep each is, and who was the first to propose it."""
        by_depth, by_source = self.drafted_by_depth, self.drafted_by_source
        by_depth.extend([0] * (max(depths, default=0) - len(by_depth)))
        for depth, source in zip(depths, sources, strict=True):
            by_depth[depth - 1] += 1
            by_source[source] = by_source.get(source, 0) + 1

    def reset(self) -> None:
        """Start counting again."""
        self.num_steps = self.num_target_tokens = self.num_output_tokens = 0
        self.num_preemptions = self.num_prefix_queries = self.num_prefix_hits = 0
        self.num_goals = self.num_goals_met = 0
        self.sums = RequestStats()
        self.steps_by_nodes, self.drafted_by_source, self.drafted_by_depth = {}, {}, []
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def host_share(self) -> float:
        """The part of all time that went to neither model's pass."""
        total = sum(self.seconds.values())
        return sum(self.seconds[part] for part in HOST_PARTS) / total if total else 0.0


class Timed:
    """A block whose time counts as a part of the step; a generator would take thrice as long."""

    __slots__ = ("_outer_s", "_part", "_start_s", "_stats")

    def __init__(self, stats: EngineStats, part: str) -> None:
        self._stats, self._part = stats, part

    def __enter__(self) -> None:
        self._outer_s, self._stats.nested_s = self._stats.nested_s, 0.0
        self._start_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        elapsed_s = time.perf_counter() - self._start_s
        self._stats.seconds[self._part] += elapsed_s - self._stats.nested_s
        self._stats.nested_s = self._outer_s + elapsed_s
