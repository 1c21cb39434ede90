"""Where a step's time goes, and how many tokens came of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PARTS = ("schedule", "draft", "target", "verify", "commit")


@dataclass(slots=True)
class EngineStats:
    """Sums since the engine started, or since `reset`.

    seconds        per part of a step
    num_steps      steps that computed something
    num_target_tokens  tokens the target computed: prompt chunks, roots and drafted nodes
    num_output_tokens  tokens emitted
    """

    num_steps: int = 0
    num_target_tokens: int = 0
    num_output_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def reset(self) -> None:
        """Start counting again."""
        self.num_steps = self.num_target_tokens = self.num_output_tokens = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
