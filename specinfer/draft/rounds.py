"""Rounds of best-first growth: what nodes are worth, and which drafter passes are worth their time.

The value of a slot is the chance that it is accepted,

    value = reach of its node · P(all earlier slots rejected) · P(accepted | reached)

the last from learnt tables, or from the drafters' own word.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specinfer.draft.base import Draft, Drafter, DrafterFailedError, Pick
from specinfer.draft.calibration import Calibration
from specinfer.draft.growth import Growth, Guesses, as_picks, guess
from specinfer.ops.native import Growing, address, kernels
from specinfer.tree import Integers

Numbers = npt.NDArray[np.float64]

_CURVE = struct.Struct("=2qd")
"""A `Curve` of ops/native/guesses.h."""

WIDEST = 24
"""Slots under one node at most: later ones are worth nothing."""

PRICED_WIDEST = 8
"""The same where nodes have a price: later ones are hardly ever worth it."""

LEAST = 1e-4
"""Slots less likely to be accepted than this are not looked at."""

ROWS = 4
"""Nodes of one request that a priced round expands at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What a step costs, in expected tokens: fixed before any tree of the step is drawn.

    nodes   [stop] one more drafted node where the step has 0, 1, … of them; never falls
    totals  [stop] 0, 1, … drafted nodes together
    rounds  per drafter, [stop] one more pass over 0, 1, … nodes
    first_rounds  the same for a step's first pass, in which drafters catch up with what was
                  committed; all that speculating costs once a step is in it
    """

    nodes: Numbers
    totals: Numbers
    rounds: Sequence[Numbers]
    first_rounds: Sequence[Numbers]


class Values:
    """The chance that a slot is accepted, by source and regime."""

    def __init__(self, calibration: Calibration | None, drafters: Sequence[Drafter]) -> None:
        self._calibration = calibration
        self._names = [drafter.name for drafter in drafters]

    def after(
        self, source: int, growths: Sequence[Growth], ranks: Integers, probabilities: Numbers
    ) -> Numbers:
        """By the probability of the tokens themselves; [rows, width], one row per growth."""
        if self._calibration is None:
            return probabilities
        rates = np.empty_like(probabilities)
        for regime, rows in _by([growth.regime for growth in growths]).items():
            table = self._calibration.table(self._names[source], regime)
            own = slice(None) if len(rows) == len(growths) else rows
            rates[own] = table.after.along(ranks[own], probabilities[own])
        return _favoured(rates, self._odds(source, growths)[:, None])

    def curves(self, source: int, growths: Sequence[Growth]) -> bytes:
        """What values the next slots of each growth, as our kernels read it."""
        if self._calibration is None:
            return _CURVE.pack(0, 0, 1.0) * len(growths)
        curves = []
        for growth in growths:
            table = self._calibration.table(self._names[source], growth.regime)
            own = table.after if growth.draw == "pick" else table.before
            curves.append(_CURVE.pack(*own.addresses, growth.odds(source)))
        return b"".join(curves)

    def after_one(self, source: int, growth: Growth, rank: int, probability: float) -> float:
        """The same for one slot."""
        if self._calibration is None:
            return min(1.0, probability)
        table = self._calibration.table(self._names[source], growth.regime)
        return _favoured_one(table.after.at(rank, probability), growth.odds(source))

    def before_one(self, source: int, growth: Growth, rank: int, largest: float) -> float:
        """Before the draw: by the largest probability of the law."""
        if self._calibration is None:
            return min(1.0, largest)
        table = self._calibration.table(self._names[source], growth.regime)
        return _favoured_one(table.before.at(rank, largest), growth.odds(source))

    def worth_asking(
        self,
        source: int,
        growths: Sequence[Growth],
        reaches: Sequence[float],
        price: float,
        costs: Numbers,
    ) -> Sequence[int]:
        """Which nodes a drafter's pass is worth its time for, the best first.

        reaches  [nodes] the chance that verification comes to the node, times its urgency; one
                 growth for each
        price    of one more node
        costs    [stop] of a pass over 0, 1, … nodes
        """
        if (found := kernels()) is not None:
            reached, rows = array("d", reaches), array("q", bytes(8 * len(reaches)))
            count = found.choose(
                *(reached.buffer_info()[0], self.curves(source, growths), len(rows), price),
                *(address(costs), len(costs), rows.buffer_info()[0]),
            )
            return rows[:count]
        above = np.maximum(0.0, np.array(reaches) - price)
        if above.sum() <= costs[1]:
            return []  # not if every guess were right
        gains = self.gains(source, growths, np.array(reaches), price)
        order = np.argsort(-gains, kind="stable")
        order = order[: len(costs) - 1]
        worth = np.cumsum(gains[order]) - costs[1 : len(order) + 1]
        best = int(worth.argmax())
        return order[: best + 1].tolist() if worth[best] > 0 else []

    def gains(
        self, source: int, growths: Sequence[Growth], reaches: Numbers, price: float
    ) -> Numbers:
        """What expanding nodes is expected to bring: their first slots' value above the price."""
        if self._calibration is None:
            return np.maximum(0.0, reaches - price)
        odds, worth = self._odds(source, growths), np.empty(len(growths))
        for (regime, draw), rows in _by([(g.regime, g.draw) for g in growths]).items():
            table = self._calibration.table(self._names[source], regime)
            shares, rates = (table.after if draw == "pick" else table.before).first_slots
            own = _favoured(rates, odds[rows, None])
            worth[rows] = np.maximum(0.0, reaches[rows, None] * own - price) @ shares
        return worth

    def _odds(self, source: int, growths: Sequence[Growth]) -> Numbers:
        return np.array([growth.odds(source) for growth in growths])


def _by(kinds: Sequence[Any]) -> dict[Any, list[int]]:
    """Rows of each kind."""
    rows: dict[Any, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    return rows


def _favoured(rates: Numbers, odds: Numbers) -> Numbers:
    """Rates whose odds are multiplied."""
    return rates * odds / (1.0 - rates + rates * odds)


def _favoured_one(rate: float, odds: float) -> float:
    return rate * odds / (1.0 - rate + rate * odds)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be expanded: of which request, and what reaching it is worth."""

    index: int
    node: int
    reach: float


class Rounds:
    """Asks the drafters, as far as their passes are worth it, and keeps who knows which node.

    answers  per drafter asked in this round: what it said, and (request, node) -> row
    """

    def __init__(
        self,
        growths: Sequence[Growth],
        drafters: Sequence[Drafter],
        drafts: dict[int, Draft],
        values: Values,
        prices: Prices | None,
    ) -> None:
        self.answers: dict[int, tuple[Guesses, dict[tuple[int, int], int]]] = {}
        self.num_rounds = 0
        self._growths = growths
        self._drafters = drafters
        self._drafts = drafts
        self._values = values
        self._prices = prices
        self._sources = sorted({source for growth in growths for source in growth.sources})
        self._known: dict[tuple[int, int], set[int]] = {}  # (source, request) -> nodes asked

    def asked(self, source: int, index: int) -> bool:
        """Whether a drafter has been asked about a request at all."""
        return (source, index) in self._known

    def ask(self, frontier: Sequence[Candidate], price: float) -> bool:
        """One round; False where no pass is worth its time.

        price  of one more node
        """
        self.answers = {}
        for source in self._sources:
            chosen = self._choose(source, frontier, price)
            if not chosen:
                continue
            nodes: dict[int, list[int]] = {}
            for candidate in chosen:
                nodes.setdefault(candidate.index, []).append(candidate.node)
            try:
                said = guess(
                    self._drafters[source],
                    [(self._growths[i], self._drafts[i], own) for i, own in nodes.items()],
                )
            except DrafterFailedError:
                continue
            pairs = [(i, node) for i, own in nodes.items() for node in own]
            self.answers[source] = (said, {pair: row for row, pair in enumerate(pairs)})
            for i, own in nodes.items():
                self._known.setdefault((source, i), set()).update(own)
        self.num_rounds += 1
        return bool(self.answers)

    def grow_on(
        self, source: int, drafts: Sequence[tuple[Draft, int]], growing: Growing, most: int
    ) -> bool:
        """Let a drafter that can take all further rounds by itself; False: it cannot."""
        grow_on = getattr(self._drafters[source], "grow_on", None)
        return grow_on is not None and bool(grow_on(drafts, growing, self.num_rounds, most))

    def _choose(
        self, source: int, frontier: Sequence[Candidate], price: float
    ) -> Sequence[Candidate]:
        """What to ask one drafter: it must know a node's parent, and be worth its pass."""
        able = [each for each in frontier if self._can_ask(source, each)]
        if self._prices is None or not able:
            return able
        growths = [self._growths[each.index] for each in able]
        costs = self._prices.rounds if self.num_rounds else self._prices.first_rounds
        reaches = [each.reach for each in able]
        rows = self._values.worth_asking(source, growths, reaches, price, costs[source])
        return [able[row] for row in rows]

    def _can_ask(self, source: int, candidate: Candidate) -> bool:
        if source not in self._growths[candidate.index].sources:
            return False
        if candidate.node == 0:
            return True
        parent = self._drafts[candidate.index].tree.parents[candidate.node]
        return parent in self._known.get((source, candidate.index), ())


class Told:
    """A drafter's answer as picks, whatever it was."""

    def __init__(self, said: Guesses, width: int = WIDEST) -> None:
        self._picks = said.picks
        if self._picks is None:
            self._picks = as_picks(*said.likeliest(width))

    def row(self, row: int) -> list[Pick]:
        """(token, probability) after one node, likeliest first."""
        assert self._picks is not None
        return self._picks[row]


class Queue:
    """One drafter's guesses after one node, without those that others have made."""

    def __init__(self, source: int, picks: list[Pick]) -> None:
        self.source = source
        self._picks = picks
        self._probability = dict(picks)

    def next(self, seen: set[int]) -> tuple[int, float] | None:
        """The likeliest token not seen, and its share of what is left."""
        for token, probability in self._picks:
            if token not in seen and probability > 0:
                left = 1.0 - sum(self._probability.get(each, 0.0) for each in seen)
                return token, min(1.0, probability / max(left, probability))
        return None
