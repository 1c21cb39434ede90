"""Ratios of sums over prompts, with intervals: what measurements that count tokens report.

Steps of one prompt are alike, so prompts are what is drawn anew: every interval is a bootstrap over
prompts. All of them use the same draws, so ratios of two systems on the same prompts are paired.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

_RESAMPLES = 4000
_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and where it lies in 95 % of the bootstrap's draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(slots=True, eq=False)
class Counts:
    """What was counted per prompt: a part, such as tokens, and a whole, such as steps.

    parts, wholes  [prompts]; a prompt may have counted nothing
    """

    parts: Numbers
    wholes: Numbers

    @classmethod
    def zeros(cls, num_prompts: int) -> "Counts":
        """Nothing counted yet."""
        return cls(np.zeros(num_prompts), np.zeros(num_prompts))

    @classmethod
    def parse(cls, text: str) -> "Counts":
        """What `str` wrote."""
        pairs = [each.split("/") for each in text.split()]
        return cls(*np.array(pairs, np.float64).reshape(-1, 2).T.copy())

    def __str__(self) -> str:
        """Part/whole of each prompt."""
        pairs = zip(self.parts, self.wholes, strict=True)
        return " ".join(f"{part:.12g}/{whole:.12g}" for part, whole in pairs)

    def add(self, prompt: int, part: float, whole: float = 1.0) -> None:
        """Count something for one prompt."""
        self.parts[prompt] += part
        self.wholes[prompt] += whole

    def rate(self) -> Interval:
        """Parts over wholes, of all prompts together."""
        return _interval(_ratio(self.parts.sum(), self.wholes.sum()), self._resampled())

    def ratio(self, base: "Counts") -> Interval:
        """This rate over another's, paired by prompt."""
        value = _ratio(self.parts.sum(), self.wholes.sum())
        other = _ratio(base.parts.sum(), base.wholes.sum())
        return _interval(value / other, self._resampled() / base._resampled())

    def _resampled(self) -> Numbers:
        weights = _weights(len(self.parts))
        with np.errstate(invalid="ignore"):  # a draw of prompts that counted nothing
            rates: Numbers = (weights @ self.parts) / (weights @ self.wholes)
        return rates


@functools.cache
def _weights(num_prompts: int) -> Numbers:
    """[resamples, prompts]: how often each draw has each prompt."""
    rng = np.random.default_rng(0)
    share = np.full(num_prompts, 1.0 / num_prompts)
    return rng.multinomial(num_prompts, share, _RESAMPLES).astype(np.float64)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _interval(value: float, draws: Numbers) -> Interval:
    edge = (1.0 - _SHARE) / 2
    low, high = np.nanquantile(draws, [edge, 1.0 - edge]) if value == value else (value, value)
    return Interval(float(value), float(low), float(high))
