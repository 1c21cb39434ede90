"""Controllers from the literature: how long a chain to draft, for measurements to compare with.

Never defaults. Each decides from past steps alone, so what it decides is predictable and every
verifier stays exact (nothing here sees a token). A chain is a tree of width one.
"""

from dataclasses import dataclass, field
from typing import Protocol


class ChainController(Protocol):
    """Decides how many tokens to draft, before each step."""

    def length(self, key: int, batch_size: int) -> int:
        """Tokens to draft for one sequence, in a step of so many sequences; 0: none."""
        ...

    def observe(self, key: int, drafted: int, accepted: int, batch_size: int) -> None:
        """Learn what became of a chain: tokens drafted, and how many of them were accepted."""
        ...

    def drop(self, key: int) -> None:
        """Forget a sequence that has ended."""
        ...


class StepSeconds(Protocol):
    """What a model's step costs; `engine.times.StepTimes` is one."""

    def seconds(self, num_tokens: int, num_spans: int = 1) -> float:
        """Seconds of a step with so many tokens of so many sequences."""
        ...


@dataclass(slots=True)
class _Gamma:
    """One sequence's length, not yet rounded, and its average of accepted tokens."""

    length: float
    average: float


class GammaTune:
    """A length per sequence that follows its moving average of accepted tokens.

    source     Gautam, Shrestha, Reddy, "Token-Driven GammaTune" (arXiv 2504.00030), by its idea;
               the constants and the rule's details are ours, not the authors'
    average    e <- e + smoothing * (accepted - e); starts at `initial`
    all kept   length <- length + growth, so that a length that always holds reaches `longest`
    otherwise  length <- length + pull * (e + 1 - length): one more than usually holds
    bounds     1 to `longest`; the answer is rounded to the nearest whole number, halves up
    """

    def __init__(
        self,
        longest: int,
        *,
        initial: int = 4,
        smoothing: float = 0.3,
        growth: float = 1.0,
        pull: float = 0.5,
    ) -> None:
        assert longest >= 1
        self._longest = longest
        self._initial = float(max(1, min(initial, longest)))
        self._smoothing = smoothing
        self._growth = growth
        self._pull = pull
        self._states: dict[int, _Gamma] = {}

    def length(self, key: int, batch_size: int) -> int:
        """See `ChainController.length`: the batch does not matter."""
        state = self._states.get(key)
        return int((self._initial if state is None else state.length) + 0.5)

    def observe(self, key: int, drafted: int, accepted: int, batch_size: int) -> None:
        """See `ChainController.observe`; a step without a chain says nothing."""
        assert 0 <= accepted <= drafted
        if not drafted:
            return
        state = self._states.setdefault(key, _Gamma(self._initial, self._initial))
        state.average += self._smoothing * (accepted - state.average)
        if accepted == drafted:
            state.length += self._growth
        else:
            state.length += self._pull * (state.average + 1 - state.length)
        state.length = max(1.0, min(state.length, float(self._longest)))

    def drop(self, key: int) -> None:
        """See `ChainController.drop`."""
        self._states.pop(key, None)


@dataclass(slots=True)
class SmartSpec:
    """One length for the whole batch: that of the greatest expected goodput.

        goodput(k) = batch * (1 - α^(k+1)) / (1 - α) / (k * t_draft(batch) + t_target(batch*(k+1)))

    α is a moving average over all sequences of the acceptance of examined tokens: the accepted
    ones, and the one rejected behind them. Of equal lengths the shortest wins. Length 0 learns
    nothing, so that it would be kept for ever; after `probe_every` such steps one token is drafted
    once, which is our addition.

    source       Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models
                 Using Goodput" (arXiv 2406.14066), with measured times instead of a linear fit
    target       the target's step
    drafter      the drafter's step: a chain of k takes k of them, one after the other
    longest      the longest chain
    acceptance   α before anything was observed
    smoothing    weight of one observed token in α
    probe_every  steps at length 0 before one token is drafted; 0: never
    """

    target: StepSeconds
    drafter: StepSeconds
    longest: int
    acceptance: float = 0.7
    smoothing: float = 0.02
    probe_every: int = 64
    _idle: float = field(default=0.0, init=False)
    _best: dict[int, int] = field(default_factory=dict, init=False)

    def length(self, key: int, batch_size: int) -> int:
        """See `ChainController.length`: the same for all sequences of a step."""
        best = self._best.get(batch_size)
        if best is None:
            # Fixed until the next observation, so that one step has one length.
            lengths = range(self.longest + 1)
            best = max(lengths, key=lambda length: self.goodput(length, batch_size))
            self._best[batch_size] = best
        if best == 0 and self.longest and self.probe_every and self._idle >= self.probe_every:
            return 1
        return best

    def goodput(self, length: int, batch_size: int) -> float:
        """Expected tokens per second at one length."""
        each = sum(self.acceptance**i for i in range(length + 1))  # no division at α = 1
        draft_s = length * self.drafter.seconds(batch_size, batch_size)
        target_s = self.target.seconds(batch_size * (length + 1), batch_size)
        return batch_size * each / (draft_s + target_s)

    def observe(self, key: int, drafted: int, accepted: int, batch_size: int) -> None:
        """See `ChainController.observe`."""
        assert 0 <= accepted <= drafted
        self._best.clear()  # times may have been corrected as well
        if not drafted:
            self._idle += 1 / batch_size
            return
        self._idle = 0.0
        for token in range(min(drafted, accepted + 1)):
            self.acceptance += self.smoothing * ((token < accepted) - self.acceptance)

    def drop(self, key: int) -> None:
        """See `ChainController.drop`: nothing is kept per sequence."""
