"""Seconds of the host: what a step takes beside the models' passes, learnt from steps."""

import math
from typing import NamedTuple

from specinfer.engine.stats import StepLoad

_RATE = 0.1
"""How fast costs follow what is measured."""

_MOST = 3.0
"""Times what was expected: a step that took longer counts as so long, for a busy moment is no
cost."""


class HostTimes(NamedTuple):
    """Seconds of the host.

    step, span, node  per step, sequence and drafted node
    draft             where drafters are asked at all, whatever comes of it
    round             per pass of a drafter
    """

    step: float
    span: float
    node: float
    draft: float
    round: float

    def after(self, load: StepLoad) -> "HostTimes":
        """The same one step later: what was missing is blamed on each cost by its share.

        Normalised least mean squares in logarithms: a step moves what it was expected to take by
        `_RATE` of what was missing, however many costs share it.
        """
        num_passes = len(load.passes)
        counts = (1, load.num_spans, load.num_nodes, num_passes > 0, num_passes)
        parts = [count * each for count, each in zip(counts, self, strict=True)]
        expected = sum(parts)
        missing = min(load.host_s, _MOST * expected) / expected - 1
        rate = _RATE * missing * expected / sum(part * part for part in parts)
        return HostTimes._make(
            each * math.exp(rate * part) for each, part in zip(self, parts, strict=True)
        )


HOST_S = HostTimes(step=1.5e-4, span=5e-5, node=1e-5, draft=1e-4, round=2e-4)
"""At first."""
