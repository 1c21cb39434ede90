"""Where a step's time goes, and how many tokens came of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from specinfer.draft.base import Draft, Drafter, Pick

PARTS = ("schedule", "draft", "grow", "target", "verify", "commit")
"""draft: the drafters' passes; grow: making trees of what they said; target: the target's pass."""

HOST_PARTS = ("schedule", "grow", "verify", "commit")
"""What is neither model's pass."""


@dataclass(slots=True)
class EngineStats:
    """Sums since the engine started, or since `reset`.

    num_steps          steps that computed something
    num_target_tokens  tokens the target computed: prompt chunks, roots and drafted nodes
    num_output_tokens  tokens emitted
    seconds            per part of a step; a part inside a part counts once, as the inner one
    """

    num_steps: int = 0
    num_target_tokens: int = 0
    num_output_tokens: int = 0
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
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def host_share(self) -> float:
        """The part of all time that went to neither model's pass."""
        total = sum(self.seconds.values())
        return sum(self.seconds[part] for part in HOST_PARTS) / total if total else 0.0


class TimedDrafter:
    """A drafter whose passes count as "draft", wherever they are called from."""

    def __init__(self, drafter: Drafter, stats: EngineStats) -> None:
        self.name = drafter.name
        self.max_positions = drafter.max_positions
        self._drafter = drafter
        self._stats = stats

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor | list[list[Pick]]:
        """See `Drafter.expand`."""
        with self._stats.timed("draft"):
            return self._drafter.expand(frontier)

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`."""
        self._drafter.admit(accepted)

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        self._drafter.drop(key)
