"""How much to speculate: prices for nodes and drafter passes, from measured times and past steps.

A step of B sequences emits B + Σ value(slots) tokens in T_draft + T_target + T_host seconds. The
slots that make their quotient greatest are those worth more than λ · their seconds, λ being the
greatest quotient itself (Dinkelbach; docs/algorithm.md, "Control"). It is taken from past steps, so
what is drawn stays predictable; where no slot is worth its price the step is a plain one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from specinfer.draft.rounds import Prices
from specinfer.engine.goodput import PATIENCE, Goodput, bucket_of
from specinfer.engine.host import HOST_S, HostTimes
from specinfer.engine.stats import Pass, StepLoad
from specinfer.engine.times import Seconds, StepTimes
from specinfer.engine.trial import Trial

_T = TypeVar("_T")

_MARGIN = 1.05
"""Trees are priced above what they must be worth: what they are worth is an estimate."""

_PROBE_DISCOUNT = 0.5
"""What a probe's prices are multiplied by."""

_FREE_PASS_S = 2e-5
"""A pass of a drafter without a model, per node."""

_GRID = 32.0
"""Prices are computed anew when what they are made of has moved by a 32nd of its logarithm: they
differ by less than they are known, and making them takes a tenth of a small model's step."""

_MAX_COMPUTED = 256


class Controller:
    """Sets the prices of each step, and learns from it what steps cost and bring.

    target    seconds of the target's steps
    drafters  the same for each drafter, None for those without a model
    """

    def __init__(self, target: StepTimes, drafters: Sequence[StepTimes | None]) -> None:
        self.target = target
        self.drafters = list(drafters)
        self._host_s = HOST_S
        self._goodput: defaultdict[int, Goodput] = defaultdict(Goodput)  # by `bucket_of`
        self._trials: defaultdict[int, Trial] = defaultdict(Trial)  # the same
        self._last_bucket = -1
        self._num_rested = 0  # steps in a row without a drafter's pass
        self._computed: dict[tuple[float, ...], tuple[tuple[int, ...], Any]] = {}

    def rests(self, num_spans: int) -> bool:
        """Whether to draft nothing now, without asking: nothing was worth it for several steps.

        What is looked at in each step costs a small model several per cent of it.
        """
        bucket = bucket_of(num_spans)
        if self._trials[bucket].rest:
            return True
        return bucket == self._last_bucket and self._goodput[bucket].rests

    # --- prices -----------------------------------------------------------------------------------

    def prices(self, num_tokens: int, num_spans: int, stop: int) -> Prices:
        """What this step's nodes and rounds must be worth.

        num_tokens  the target computes anyway: prompt chunks and roots, in num_spans sequences
        stop        drafted nodes there may be, plus one
        """
        past = self._goodput[bucket_of(num_spans)]
        unit_s = self.target.measured(1)  # so that a slower machine decides the same
        rate = _coarse(_MARGIN * self.goodput(num_tokens, num_spans) * unit_s) / unit_s
        host = HostTimes._make(_coarse(each / unit_s) * unit_s for each in self._host_s)
        fed = round(min(2.0, 1.0 + past.accepted), 1)  # the rest: known from drafting
        probes = past.probes

        def compute() -> Prices:
            slopes_s, totals_s = self._nodes_s(num_tokens, num_spans, stop)
            slopes = rate * (slopes_s + host.node)
            totals = rate * (totals_s + host.node * np.arange(stop))
            rounds, first_rounds = (
                [
                    rate * (self._passes_s(source, stop, num_spans, each) + host_s)
                    for source in range(len(self.drafters))
                ]
                for each, host_s in ((1.0, host.round), (fed, host.draft + host.round))
            )
            if probes:
                # Of one node per sequence: larger probes of a good drafter took 5 % of all time.
                slopes[:num_spans] *= _PROBE_DISCOUNT
                totals -= (1 - _PROBE_DISCOUNT) * totals[np.minimum(np.arange(stop), num_spans)]
                rounds = [_PROBE_DISCOUNT * each for each in rounds]
                first_rounds = [_PROBE_DISCOUNT * each for each in first_rounds]
            return Prices(slopes, totals, rounds, first_rounds)

        versions = tuple([times.version for times in (self.target, *self.drafters) if times])
        asked = num_tokens, num_spans, stop, fed, rate, *host[2:], probes
        return self._kept(asked, versions, compute)

    def _nodes_s(self, num_tokens: int, num_spans: int, stop: int) -> tuple[Seconds, Seconds]:
        """Seconds of the target: [stop] of one more node, [stop] of so many nodes together."""
        most = _round_up(num_tokens + stop + 1)

        def compute() -> tuple[Seconds, Seconds]:
            own = self.target.table(most, num_spans)[num_tokens : num_tokens + stop]
            hull = self.target.hull(most, num_spans)[num_tokens : num_tokens + stop + 1]
            return np.maximum(0.0, np.diff(hull)), own - own[0]

        return self._kept((num_tokens, num_spans, stop), (self.target.version,), compute)

    def _passes_s(self, source: int, stop: int, num_spans: int, fed: float) -> Seconds:
        """[stop] seconds of a drafter's pass over 0, 1, … nodes of up to so many sequences.

        fed  tokens computed per node
        """
        times = self.drafters[source]

        def compute() -> Seconds:
            nodes = np.arange(stop, dtype=np.float64)
            if times is None:
                return _FREE_PASS_S * nodes
            table = times.table(_round_up(math.ceil((stop - 1) * fed) + 1))
            tokens = np.ceil(nodes * fed).astype(np.int64)
            extra = np.minimum(nodes, num_spans) - 1
            seconds: Seconds = table[tokens] + times.span_s * np.maximum(0.0, extra)
            return seconds

        version = 0 if times is None else times.version
        return self._kept((source, stop, num_spans, fed), (version,), compute)

    def _kept(
        self, key: tuple[float, ...], versions: tuple[int, ...], compute: Callable[[], _T]
    ) -> _T:
        """What was computed from tables of times, until there are others.

        key  one dictionary holds all kinds: no two kinds have keys of one length
        """
        known = self._computed.get(key)
        if known is None or known[0] != versions:
            if len(self._computed) >= _MAX_COMPUTED:
                self._computed.clear()
            known = self._computed[key] = (versions, compute())
        return cast(_T, known[1])

    def level_times(self, num_spans: int, max_nodes: int) -> tuple[float, Seconds]:
        """What Sequoia's programme weighs: seconds per level of the first drafter, and per step.

        returns  the second [max_nodes + 2] by tokens of each of num_spans sequences
        """
        table = self.target.table(_round_up((max_nodes + 2) * num_spans), num_spans)
        drafter = self.drafters[0]
        draft_s = _FREE_PASS_S if drafter is None else drafter.seconds(num_spans, num_spans)
        per_sequence = np.arange(max_nodes + 2) * num_spans
        return draft_s + self._host_s.round, table[per_sequence]

    # --- what steps take and bring ----------------------------------------------------------------

    def goodput(self, num_tokens: int, num_spans: int) -> float:
        """λ, tokens per second: what steps of this size brought, at least what plain ones do."""
        plain = num_spans / self.plain_s(num_tokens, num_spans)
        return max(plain, self._goodput[bucket_of(num_spans)].rate)

    def plain_s(self, num_tokens: int, num_spans: int) -> float:
        """Seconds of a step without trees."""
        host = self._host_s
        return self.target.seconds(num_tokens, num_spans) + host.step + host.span * num_spans

    def pass_s(self, one: Pass) -> float:
        """What a drafter's pass costs by the model of times, in seconds."""
        times = self.drafters[one.source]
        if times is None:
            return _FREE_PASS_S * one.num_nodes
        return times.seconds(one.num_tokens, one.num_spans)

    def observe(self, load: StepLoad, *, decoding_only: bool) -> None:
        """Learn from a step.

        decoding_only  nobody's prompt was computed: only such steps tell what decoding brings
        """
        if not decoding_only:
            return
        # After long rests a first pass takes several times as long as the next ones.
        is_cold = bool(load.passes) and self._num_rested > PATIENCE
        self._num_rested = 0 if load.passes else self._num_rested + 1
        if not is_cold:
            for each in load.passes:
                times = self.drafters[each.source]
                if times is not None:
                    times.observe(each.num_tokens, each.seconds, each.num_spans)
            self._host_s = self._host_s.after(load)
        self.target.observe(load.num_tokens, load.target_s, load.num_spans)
        self._last_bucket = bucket = bucket_of(load.num_spans)
        trial = self._trials[bucket]
        # Seconds as the model has them, so that a busy machine does not look like a bad tree.
        self._goodput[bucket].add(load, self._step_s(load), was_told=trial.rest > 0)
        spent_s = load.target_s + load.host_s + sum([each.seconds for each in load.passes])
        trial.add(
            load.num_emitted,
            spent_s,
            drafted=load.num_nodes > 0,
            expected=self._plain_rate(load.num_spans),
        )

    def _step_s(self, load: StepLoad) -> float:
        """What a step should have taken, in seconds."""
        plain_s = self.plain_s(load.num_tokens, load.num_spans)
        if not load.passes:
            return plain_s
        host = self._host_s
        drafting = sum([self.pass_s(one) + host.round for one in load.passes])
        return plain_s + drafting + host.draft + host.node * load.num_nodes

    def _plain_rate(self, num_spans: int) -> float:
        """Tokens per second of plain steps: as measured at start-up or as corrected, the greater.

        Corrections cannot tell trees that take longer than was thought from a slower machine.
        """
        corrected = self.plain_s(num_spans, num_spans)
        step_s = self.target.measured(num_spans, num_spans)
        return num_spans / min(step_s, corrected)


def _round_up(stop: int) -> int:
    """A power of two from 128 on, so that few tables are kept."""
    return max(128, 1 << (stop - 1).bit_length())


def _coarse(value: float) -> float:
    """The nearest of few numbers: within 1.6 %."""
    return math.exp(round(math.log(value) * _GRID) / _GRID)
