"""Learnt acceptance: how often a slot is accepted, given that the verifier reaches it.

A drafter's own probability misleads: distilled drafters are right more often than they say, others
less often. So trees are grown by what was seen (docs/algorithm.md, "Growth"):

    before[j][max π]  P(slot j accepted | reached), known before its token is drawn: ranks slots
    after [j][π(x)]   the same once it is drawn: weighs what hangs below and beside it

Learnt from every slot that verification reached, per drafter and regime. Trees are grown from past
steps' tables only, so the laws stay exact whatever the tables say.
"""

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from specinfer.errors import ConfigError
from specinfer.ops.native import kernels

Regime = Literal["greedy", "seeded", "cold", "warm", "hot"]
"""Requests whose slots are accepted alike: greedy ones and those hardly warmer, seeded ones, and
temperatures up to 0.45, up to 0.8 and above."""

COLDEST_DRAW = 0.05
"""Up to this temperature slots are picked, above it they are drawn (docs/performance.md)."""

REGIMES: tuple[Regime, ...] = get_args(Regime)

NUM_RANKS = 8
"""Slots of a node that are told apart; later ones count as the last."""

_REACH = 8.0
_STEP = 0.5
_NUM_KNOTS = 33
"""Probabilities are told apart by their log-odds, from -8 to 8; between knots rates are linear."""

_PRIOR_TRIALS = 8.0
"""Where nothing is known, a drafter's own word weighs as much as so many slots at each knot."""

_MAX_TRIALS = 4096.0
"""Beyond so many slots at a knot the old ones fade, so that a drafter may change."""

NUM_PLACES = 16
"""Places among siblings whose acceptance is counted for Sequoia's shapes."""

_PLACES = [0.6, 0.4, 0.3, 0.2] + [0.1] * (NUM_PLACES - 4)
"""Acceptance by place, given that it is reached, where nothing is known."""

_FORMAT = 1

Rates = npt.NDArray[np.float64]


def regime_of(temperature: float, *, greedy: bool, seeded: bool) -> Regime:
    """The regime of a request."""
    if seeded and not greedy:
        return "seeded"
    if greedy or temperature <= COLDEST_DRAW:
        return "greedy"
    return "cold" if temperature <= 0.45 else "warm" if temperature <= 0.8 else "hot"


class Features(NamedTuple):
    """What was known of a slot: its place among its siblings, max π before the draw, π(x) after."""

    rank: int
    before: float
    after: float


def knots_of(probability: npt.ArrayLike) -> Rates:
    """Where probabilities stand on the axis of the tables: [...] float64 in [0, knots - 1]."""
    p = np.maximum(np.minimum(np.asarray(probability, np.float64), 1 - 1e-9), 1e-9)
    axis: Rates = np.log(p / (1 - p)) / _STEP + _REACH / _STEP
    return np.maximum(np.minimum(axis, _NUM_KNOTS - 1.0), 0.0)  # np.clip takes three times as long


_OWN_VARIANCE = 0.3
"""Of requests' log-odds of acceptance around their table's."""

_OWN_FADE = 0.98
"""What a request's slots weigh, from one to the next."""


class Fortune:
    """How much better or worse than its table one request's drafts are: odds to multiply by.

    A logistic model with one offset per request: the offset is what the request's slots were
    accepted oftener than expected, over the information in them, drawn towards none. On the bundled
    pair it lowers the log loss of acceptance from .493 to .486.
    """

    __slots__ = ("_information", "_surprise", "odds")

    def __init__(self) -> None:
        self._surprise = self._information = 0.0
        self.odds = 1.0

    def observe(self, expected: float, accepted: float) -> None:
        """Learn from a slot that verification reached, and what its table said of it."""
        self._surprise = self._surprise * _OWN_FADE + accepted - expected
        self._information = self._information * _OWN_FADE + expected * (1.0 - expected)
        self.odds = math.exp(self._surprise / (self._information + 1.0 / _OWN_VARIANCE))


def _knot_of(probability: float) -> float:
    """`knots_of` for one."""
    p = min(max(probability, 1e-9), 1 - 1e-9)
    axis = math.log(p / (1 - p)) / _STEP + _REACH / _STEP
    return min(max(axis, 0.0), _NUM_KNOTS - 1.0)


_IDENTITY = 1 / (1 + np.exp(-(np.arange(_NUM_KNOTS) * _STEP - _REACH)))


class Curves:
    """Acceptance by rank and probability: [ranks, knots] of what was seen.

    prior  (trials, hits) [ranks, knots] to start from; None: a drafter is right as often as it says
    """

    def __init__(self, prior: tuple[Rates, Rates] | None = None) -> None:
        if prior is None:
            trials = np.full((NUM_RANKS, _NUM_KNOTS), _PRIOR_TRIALS)
            prior = trials, trials * _IDENTITY
        self.reset(*prior)

    def reset(self, trials: Rates, hits: Rates) -> None:
        """Forget what was seen, for these counts."""
        self.trials, self.hits = trials.copy(), hits.copy()
        self.rates = hits / trials  # not to be written to
        self._counts = [each.ctypes.data for each in (self.trials, self.hits, self.rates)]
        self.addresses: tuple[int, int] = self.rates.ctypes.data, self.trials.ctypes.data
        """Where rates and trials begin, for kernels that read them."""

    def record(self, rank: int, probability: float, accepted: float) -> None:
        """Count one slot: `accepted` is 1 or 0, or the chance of it."""
        if (found := kernels()) is not None:
            found.record(*self._counts, rank, probability, accepted, _MAX_TRIALS)
            return
        rank = min(rank, NUM_RANKS - 1)
        axis = _knot_of(probability)
        low = min(int(axis), _NUM_KNOTS - 2)
        for knot, share in ((low, low + 1 - axis), (low + 1, axis - low)):
            place = rank, knot
            trials, hits = self.trials[place], self.hits[place]
            if trials > _MAX_TRIALS:
                trials, hits = trials / 2, hits / 2
            self.trials[place] = trials = trials + share
            self.hits[place] = hits = hits + share * accepted
            self.rates[place] = hits / trials

    def at(self, rank: int, probability: float) -> float:
        """The rate of one slot."""
        axis = _knot_of(probability)
        low = min(int(axis), _NUM_KNOTS - 2)
        left, right = self.rates[min(rank, NUM_RANKS - 1), low : low + 2].tolist()
        return float(left + (axis - low) * (right - left))

    @property
    def first_slots(self) -> tuple[Rates, Rates]:
        """How often first slots stand at each knot, and how often they are accepted there."""
        return self.trials[0] / self.trials[0].sum(), self.rates[0]

    def along(self, ranks: npt.NDArray[np.int64], probabilities: npt.ArrayLike) -> Rates:
        """The rates of many slots: ranks and probabilities broadcast against each other."""
        axis = knots_of(probabilities)
        low = np.minimum(axis.astype(np.int64), _NUM_KNOTS - 2)
        places = np.minimum(ranks, NUM_RANKS - 1) * _NUM_KNOTS + low
        rates = self.rates.ravel()
        left = rates.take(places)
        values: Rates = left + (axis - low) * (rates.take(places + 1) - left)
        return values


@dataclass(slots=True)
class Table:
    """One drafter in one regime."""

    before: Curves
    after: Curves


class Calibration:
    """The tables of every drafter, and acceptance by place for Sequoia's shapes.

    bundled  new tables start from what the bundled pair has shown (draft/priors.json, made by
             benchmarks/priors.py); else from what drafters say
    """

    def __init__(self, *, bundled: bool = True) -> None:
        self._priors = _bundled() if bundled else {}
        self._tables: dict[tuple[str, Regime], Table] = {}
        self._places: dict[Regime, Rates] = {}

    def table(self, drafter: str, regime: Regime) -> Table:
        """The table of a drafter, by its name."""
        key = (drafter, regime)
        if key not in self._tables:
            self._tables[key] = Table(
                *(Curves(self._prior(drafter, regime, name)) for name in ("before", "after"))
            )
        return self._tables[key]

    def record(
        self, drafter: str, regime: Regime, slot: Features, accepted: float, fortune: Fortune
    ) -> None:
        """Learn from one slot that verification reached: 1 or 0, or the chance of acceptance.

        fortune  the request's with this drafter; it learns first, from what the table said
        """
        table = self.table(drafter, regime)
        fortune.observe(table.after.at(slot.rank, slot.after), accepted)
        table.after.record(slot.rank, slot.after, accepted)
        table.before.record(slot.rank, slot.before, accepted)

    def record_place(self, regime: Regime, place: int, accepted: float) -> None:
        """Learn from one slot by its place among its siblings alone (0 is the first)."""
        if place < NUM_PLACES:
            counts = self._place_counts(regime)
            if counts[0, place] > _MAX_TRIALS:
                counts[:, place] /= 2
            counts[:, place] += 1.0, accepted

    def places(self, regime: Regime) -> Rates:
        """[places]: the chance that the accepted child is the slot at this place."""
        trials, hits = self._place_counts(regime)
        rates = hits / trials
        missed = np.cumprod(1 - rates)
        reached: Rates = np.concatenate(([1.0], missed[:-1]))
        taken: Rates = rates * reached
        return taken

    def save(self, file: Path) -> None:
        """Write everything learnt.

        raises  ConfigError if the file cannot be written
        """
        content = {
            "format": _FORMAT,
            "tables": [
                {
                    "drafter": drafter,
                    "regime": regime,
                    **{
                        name: {"trials": _rounded(curves.trials), "hits": _rounded(curves.hits)}
                        for name, curves in (("before", table.before), ("after", table.after))
                    },
                }
                for (drafter, regime), table in self._tables.items()
            ],
            "places": {regime: _rounded(counts) for regime, counts in self._places.items()},
        }
        temporary = file.with_name(file.name + ".part")
        try:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(file)
        except OSError as error:
            raise ConfigError(f"calibration={str(file)!r} cannot be written: {error}") from None

    @classmethod
    def load(cls, file: Path) -> "Calibration":
        """Read what `save` wrote.

        raises  ConfigError if the file is no such thing
        """
        calibration = cls()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}")
            for entry in content["tables"]:
                table = calibration.table(entry["drafter"], _regime(entry["regime"]))
                for name, curves in (("before", table.before), ("after", table.after)):
                    shape = (NUM_RANKS, _NUM_KNOTS)
                    counts = [entry[name]["trials"], entry[name]["hits"]]
                    curves.reset(*_counts(counts, (2, *shape)))
            for regime, counts in content["places"].items():
                calibration._places[_regime(regime)] = _counts(counts, (2, NUM_PLACES))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"calibration={str(file)!r} cannot be read ({error}): give a file that "
                "--calibration has written, or one that does not exist yet"
            ) from None
        return calibration

    def _place_counts(self, regime: Regime) -> Rates:
        if regime not in self._places:
            known = self._priors.get("places", {}).get(regime)
            if known is None:
                known = [[_PRIOR_TRIALS] * NUM_PLACES, [_PRIOR_TRIALS * rate for rate in _PLACES]]
            self._places[regime] = np.array(known)
        return self._places[regime]

    def _prior(self, drafter: str, regime: Regime, curves: str) -> tuple[Rates, Rates] | None:
        """What drafters of this kind have shown; None: nothing is known of it."""
        known = self._priors.get(kind_of(drafter), {}).get(regime, {}).get(curves)
        return None if known is None else (np.array(known["trials"]), np.array(known["hits"]))


def kind_of(drafter: str) -> str:
    """Whose priors a drafter starts from, by its name."""
    return drafter if drafter in ("ngram", "prediction", "forced") else "model"


@functools.cache
def _bundled() -> dict[str, Any]:
    file = resources.files("specinfer.draft").joinpath("priors.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _rounded(counts: Rates) -> list[Any]:
    return np.round(counts, 5).tolist()  # type: ignore[no-any-return]


def _counts(values: Any, shape: tuple[int, ...]) -> Rates:
    """(trials, hits) of a file."""
    counts = np.array(values, np.float64)
    if counts.shape != shape or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"counts of shape {counts.shape} where {shape} is due")
    if (counts[0] <= 0).any() or (counts[1] > counts[0]).any():
        raise ValueError("more hits than trials, or no trials")
    return counts


def _regime(name: str) -> Regime:
    if name not in REGIMES:
        raise ValueError(f"regime {name!r}")
    return name
