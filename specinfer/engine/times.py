"""How long a model's step takes, by tokens and requests, corrected by what steps take.

Speculation that never loses (SmartSpec, Sequoia) weighs expected tokens against measured seconds.
A step costs `base(tokens) + span_s * (spans - 1)`: products grow with the tokens of all requests
together, attention has a price per request, which on small models is most of a step. A machine that
gets slower as a whole (longer contexts, other programs) does not change that shape, a size that was
measured wrongly does: the two are learnt apart.
"""

import bisect
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

_DRIFT_RATE = 0.15
_OWN_RATE = 0.1
"""The part of what is missing that one observation puts right: of every size, and of its own."""

_OWN_SHARE = 0.95
"""Of what the drift does not explain; where one size alone is seen, the drift has all in time."""

_RECENT = 5
"""Medians are of so many observations: two busy moments among them change nothing."""

_FEWEST = 3
"""Observations before anything is corrected."""

_CLIP = math.log(2.0)
"""The most that is taken to be missing at once, as a logarithm."""

_NOTICEABLE = 0.02
_LOOK_EVERY = 8
"""Tables change only when a correction has moved by so much, as a logarithm, and in one observation
of so many: making them takes longer than a small model's drafter."""

_MAX_CURVES = 256
"""Tables kept; they differ by length and by number of spans."""
_MAX_EXPECTED = 4096


class StepTimes:
    """Seconds of one model's step by tokens and spans (one span per request).

    sizes    token counts that were measured, increasing
    seconds  of one span with so many tokens
    span_s   what every span after the first adds
    spread   how far not to trust it, 0.1 for a tenth: by how much rounds of measuring differed, or
             how long they waited for other programs
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seconds: Sequence[float],
        span_s: float = 0.0,
        spread: float = 0.0,
    ) -> None:
        """Start from what was measured, uncorrected.

        raises  ValueError for sizes that do not increase from 1 or more, and times that are no
                positive numbers
        """
        if not sizes or len(sizes) != len(seconds) or sizes[0] < 1:
            raise ValueError("one time per size, and sizes from 1 on")
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError("sizes must increase")
        if not all(0 < s < math.inf for s in seconds) or not 0 <= span_s < math.inf:
            raise ValueError("times must be positive numbers")
        self.sizes = tuple(sizes)
        self.span_s = span_s
        self.spread = spread
        self.version = 0  # of tables and hulls: another one with every correction
        self._sizes = np.asarray(sizes, np.float64)
        self._measured = np.asarray(seconds, np.float64)
        self._num_observed = 0
        self._drift = 0.0  # logarithm, of all sizes
        self._own = [0.0] * len(sizes)  # logarithms, what each size is off by itself
        self._applied = [0.0] * len(sizes)  # own and drift together, as tables have them
        self._residuals: deque[float] = deque(maxlen=_RECENT)
        self._recent: list[deque[float]] = [deque(maxlen=_RECENT) for _ in sizes]
        self._counts = np.ones(len(sizes))  # the trust in each size
        self._middles = [math.sqrt(a * b) for a, b in itertools.pairwise(sizes)]
        self._bases: dict[int, float] = {}
        self._knots: dict[int, Seconds] = {}
        self._curves: dict[tuple[int, int], tuple[Seconds, Seconds]] = {}
        self._expected: dict[tuple[int, int], float] = {}

    def seconds(self, num_tokens: int, num_spans: int = 1) -> float:
        """Expect a step with so many tokens in so many spans to take this long, corrected."""
        if num_tokens < 1:
            return 0.0
        known = self._expected.get((num_tokens, num_spans))
        if known is None:
            if len(self._expected) >= _MAX_EXPECTED:
                self._expected.clear()
            known = float(self._line(np.asarray([num_tokens]), self._knots_for(num_spans))[0])
            self._expected[num_tokens, num_spans] = known
        return known

    def measured(self, num_tokens: int, num_spans: int = 1) -> float:
        """The same as measured, uncorrected."""
        base_s = self._bases.get(num_tokens)
        if base_s is None:
            base_s = float(self._line(np.asarray([num_tokens]), self._measured)[0])
            self._bases[num_tokens] = base_s
        return base_s + self.span_s * (num_spans - 1)

    def table(self, stop: int, num_spans: int = 1) -> Seconds:
        """Seconds by number of tokens, corrected, for steps with so many spans.

        returns  [stop] read-only; entry 0 is 0.0 and from entry 1 on it never decreases: linear
                 between measured sizes, beyond them with the slope of the last octave
        """
        return self._curves_for(stop, num_spans)[0]

    def hull(self, stop: int, num_spans: int = 1) -> Seconds:
        """The greatest convex function below `table` from entry 1 on; entry 0 is 0.0.

        returns  [stop] read-only; equal to the table at 1 and at stop - 1
        """
        return self._curves_for(stop, num_spans)[1]

    def observe(self, num_tokens: int, seconds: float, num_spans: int = 1) -> None:
        """Correct by what a step took: every size by what all have in common, its own by the rest.

        Medians of the last five are followed, so a moment in which the machine was busy changes
        nothing. The context's length is not modelled: the drift absorbs it. Steps beyond four times
        the largest size (long prompts) are not used. Costs a microsecond or two.
        """
        assert num_tokens >= 1
        if not 0 < seconds < math.inf or num_tokens > 4 * self.sizes[-1]:
            return
        size = bisect.bisect_left(self._middles, num_tokens)
        missing = math.log(seconds / self.measured(num_tokens, num_spans))
        recent = self._recent[size]
        recent.append(missing)
        self._counts[size] += 1
        self._residuals.append(missing - self._own[size])
        if len(recent) < _FEWEST:
            return
        drift = _median(self._residuals) - self._drift
        self._drift += _DRIFT_RATE * max(-_CLIP, min(_CLIP, drift))
        own = _OWN_SHARE * (_median(recent) - self._drift) - self._own[size]
        self._own[size] += _OWN_RATE * max(-_CLIP, min(_CLIP, own))
        self._num_observed += 1
        if self._num_observed % _LOOK_EVERY == 0:
            self._apply()

    def _apply(self) -> None:
        """Make tables anew where what they were made with has moved."""
        corrections = [self._drift + each for each in self._own]
        moves = [abs(a - b) for a, b in zip(corrections, self._applied, strict=True)]
        if max(moves) > _NOTICEABLE:
            self._applied = corrections
            self.version += 1
            self._knots.clear()
            self._curves.clear()
            self._expected.clear()

    def to_json(self) -> dict[str, Any]:
        """What was measured; corrections belong to the process that made them."""
        return {
            "sizes": list(self.sizes),
            "seconds": self._measured.tolist(),
            "span_s": self.span_s,
            "spread": self.spread,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        raises  KeyError, TypeError or ValueError for anything else
        """
        sizes = [int(size) for size in data["sizes"]]
        seconds = [float(each) for each in data["seconds"]]
        return cls(sizes, seconds, float(data["span_s"]), float(data["spread"]))

    def _at_spans(self, num_spans: int) -> Seconds:
        """Measured seconds at the measured sizes, for steps with so many spans."""
        assert num_spans >= 1
        return self._measured + self.span_s * (num_spans - 1)

    def _knots_for(self, num_spans: int) -> Seconds:
        """Corrected seconds at the measured sizes, never decreasing."""
        knots = self._knots.get(num_spans)
        if knots is None:
            corrected = self._at_spans(num_spans) * np.exp(self._applied)
            knots = _isotonic(corrected, self._counts)
            self._knots[num_spans] = knots
        return knots

    def _line(self, num_tokens: npt.NDArray[Any], knots: Seconds) -> Seconds:
        """Linear between knots; beyond the last, the mean slope of the last octave.

        One size alone says nothing of the slope: then time is taken to be proportional.
        """
        last = self._sizes[-1]
        octave = max(0, int(np.searchsorted(self._sizes, last / 2, side="right")) - 1)
        if len(knots) == 1:
            slope = knots[0] / last
        else:
            octave = min(octave, len(knots) - 2)
            slope = max(0.0, (knots[-1] - knots[octave]) / (last - self._sizes[octave]))
        inside = np.interp(num_tokens, self._sizes, knots)
        return np.asarray(inside + slope * np.maximum(0, num_tokens - last), np.float64)

    def _curves_for(self, stop: int, num_spans: int) -> tuple[Seconds, Seconds]:
        """Table and hull."""
        curves = self._curves.get((stop, num_spans))
        if curves is None:
            if len(self._curves) >= _MAX_CURVES:
                self._curves.clear()
            curves = self._draw(stop, num_spans)
            for curve in curves:
                curve.setflags(write=False)
            self._curves[stop, num_spans] = curves
        return curves

    def _draw(self, stop: int, num_spans: int) -> tuple[Seconds, Seconds]:
        table, hull = np.zeros(stop), np.zeros(stop)
        if stop > 1:
            table[1:] = self._line(np.arange(1, stop), self._knots_for(num_spans))
            # It is linear between measured sizes, so only they can be corners of the hull.
            points = sorted({1, stop - 1, *(size for size in self.sizes if size < stop)})
            corners = _lower_hull(points, table[points].tolist())
            hull[1:] = np.interp(np.arange(1, stop), corners, table[corners])
        return table, hull


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _isotonic(values: Seconds, weights: npt.NDArray[np.float64]) -> Seconds:
    """The nearest values, by weighted least squares, that never decrease (pool adjacent ones)."""
    means: list[float] = []
    masses: list[float] = []
    counts: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        means.append(value)
        masses.append(weight)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            mean, mass = means.pop(), masses.pop()
            means[-1] = (means[-1] * masses[-1] + mean * mass) / (masses[-1] + mass)
            masses[-1] += mass
            counts[-2:] = [counts[-2] + counts[-1]]
    return np.repeat(means, counts)


def _lower_hull(xs: Sequence[int], ys: Sequence[float]) -> list[int]:
    """Where the greatest convex function below points, sorted by x, has corners: some of xs."""
    corners: list[int] = []
    for i in range(len(xs)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (ys[b] - ys[a]) * (xs[i] - xs[a]) < (ys[i] - ys[a]) * (xs[b] - xs[a]):
                break
            corners.pop()
        corners.append(i)
    return [xs[i] for i in corners]
