"""What past steps of about one batch size brought, and when to look whether drafting pays again."""

import functools
import math
from dataclasses import dataclass

from specinfer.engine.stats import StepLoad

_FADE = 0.98
"""What past steps weigh, from one to the next."""

PATIENCE = 8
"""Steps in a row in which nothing was worth its price; then one in as many is looked at, and after
`_LONG` one in `PROBE_EVERY`: what is looked at costs a small model several per cent of a step."""

_LONG = 256

PROBE_EVERY = 128
_PROBE_STEPS = 2
"""Where nothing was worth its price for long, drafts are priced lower in one step of so many, and
in the next if something was drafted: what drafts are worth is only learnt by drafting, and what
they take once the processor's caches know it. One step at the usual prices follows; only what is
drafted there ends the rest."""


@dataclass(slots=True)
class Goodput:
    """Tokens and seconds of past steps of about one batch size, the older the less."""

    tokens: float = 0.0
    spans: float = 0.0
    seconds: float = 0.0
    num_plain: int = 0  # steps in a row in which nothing was worth its price
    num_looks: int = 0  # to come, after a probe that drafted: all but the last are probes too

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def accepted(self) -> float:
        """Drafted tokens accepted per sequence and step; 0 before the first."""
        return max(0.0, self.tokens / self.spans - 1.0) if self.spans else 0.0

    @property
    def rests(self) -> bool:
        """Whether to draft nothing in the next step, without asking what it would be worth."""
        every = PATIENCE if self.num_plain < _LONG else PROBE_EVERY
        is_due = self.num_looks > 0 or self.num_plain % every == 0
        return self.num_plain > PATIENCE and not is_due

    @property
    def probes(self) -> bool:
        """Whether drafts are priced lower in the next step."""
        if self.num_looks:
            return self.num_looks > 1
        return self.num_plain % PROBE_EVERY == 0 < self.num_plain

    def add(self, load: StepLoad, seconds: float, *, was_told: bool) -> None:
        """Count a step; was_told  not to draft, whatever it would have been worth."""
        was_probe = self.probes
        if self.num_looks:
            self.num_looks -= 1
        elif was_probe and load.num_nodes:
            self.num_looks = _PROBE_STEPS
        self.tokens = self.tokens * _FADE + load.num_emitted
        self.spans = self.spans * _FADE + load.num_spans
        self.seconds = self.seconds * _FADE + seconds
        if not was_told:
            self.num_plain = 0 if load.num_nodes and not was_probe else self.num_plain + 1


@functools.cache
def bucket_of(num_spans: int) -> int:
    """Batch sizes that share what is known: each half of a power of two."""
    return round(2 * math.log2(num_spans))
