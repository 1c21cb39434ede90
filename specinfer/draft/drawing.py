"""Drawn trees: every slot must be predictable, so nothing that was drawn is ever taken back.

A slot is drawn when its value, known before the draw, is worth its price; what hangs below it and
beside it is then weighed by the token that came. Draws are without replacement, so that one law
never proposes a token twice.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specinfer.draft.base import Draft, Pick
from specinfer.draft.calibration import Features, Regime
from specinfer.draft.growth import Drawable, Grown, Growth
from specinfer.draft.rounds import (
    LEAST,
    ROWS,
    WIDEST,
    Candidate,
    Prices,
    Queue,
    Rounds,
    Told,
    Values,
)
from specinfer.sampling import draw
from specinfer.tree import PICK, Law, TokenTree


@dataclass(slots=True, eq=False)
class _Law:
    """One model's law after one node, while slots are drawn from it without replacement.

    law     with nothing seen
    top     its likeliest tokens
    mass    of what is left of it
    struck  columns that are not
    """

    law: Law
    top: list[Pick]
    mass: float = 1.0
    struck: list[int] = field(default_factory=list)

    def largest(self, seen: Sequence[int]) -> float:
        """The largest probability among tokens not drawn yet, renormalised; 0: nothing is left."""
        if self.mass < 1e-6:
            return 0.0
        best = next((p for token, p in self.top if token not in seen), self.top[-1][1])
        return min(1.0, best / self.mass) if best > 0 else 0.0  # NaN: what is no law says nothing

    def draw(self, rng: np.random.Generator) -> tuple[int, float]:
        """A token that was not struck out, and its probability."""
        rest = self.law.rows[self.law.row]
        if self.struck:
            rest = rest.copy()
            rest[self.struck] = 0.0
        column = draw(rest, rng)
        return self.law.token(column), min(1.0, float(rest[column]) / self.mass)

    def strike(self, token: int) -> None:
        """Take a token out that this law can no longer draw."""
        for column in self.law.columns((token,)):
            self.mass -= float(self.law.rows[self.law.row, column])
            self.struck.append(column)


@dataclass(slots=True, eq=False)
class _Place:
    """An expanded node under which slots may still be drawn.

    reach  the chance that verification comes here and rejects all slots so far
    """

    node: int
    reach: float
    laws: dict[int, _Law]
    queues: list[Queue]
    seen: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class _DrawnTree:
    """One request whose slots are drawn; nothing that was added is ever taken back."""

    growth: Growth
    draft: Draft
    threshold: float
    reach: dict[int, float] = field(default_factory=lambda: {0: 1.0})  # not expanded yet
    features: dict[int, Features] = field(default_factory=dict)
    places: dict[int, _Place] = field(default_factory=dict)
    num_before_fill: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it has as many nodes as it may have."""
        return self.draft.tree.num_drafted >= self.growth.max_nodes


class Drawing:
    """The trees of all requests whose slots are drawn, and one heap of the slots to come.

    A slot's key is its value over its request's threshold. Thresholds come from past trees (or are
    1 where there are prices): were they set by what this tree turns out to be, laws would shift.
    So does the number of nodes that prices are read at until the last round: the first nodes of a
    step are cheap, and would go to the root's siblings before anything deeper is known.
    """

    def __init__(
        self,
        growths: Sequence[Growth],
        values: Values,
        prices: Prices | None,
        past: "PastDraws",
    ) -> None:
        self._values = values
        self._prices = prices
        self._past = past
        self._trees: dict[int, _DrawnTree] = {}
        for index, growth in enumerate(growths):
            if growth.draw != "pick":
                draft = growth.draft(TokenTree(growth.tokens[-1]))
                threshold = past.thresholds.get(_size(growth), 1.0 / growth.max_nodes)
                if prices is not None:
                    threshold = 1.0
                self._trees[index] = _DrawnTree(growth, draft, threshold)
        self.drafts = {index: tree.draft for index, tree in self._trees.items()}
        # -key, order, request, node, source
        self._heap: list[tuple[float, int, int, int, int]] = []
        self._order = 0

    @property
    def num_nodes(self) -> int:
        """Drafted nodes of all requests."""
        return sum(tree.draft.tree.num_drafted for tree in self._trees.values())

    @property
    def price(self) -> float:
        """What one more node is expected to cost when all rounds are over."""
        if self._prices is None or not self._trees:
            return 0.0
        usual = sum(self._past.sizes.get(tree.growth.regime, 0.0) for tree in self._trees.values())
        num_nodes = max(self.num_nodes, round(usual))
        return float(self._prices.nodes[min(num_nodes, len(self._prices.nodes) - 1)])

    def frontier(self, num_rounds: int) -> list[Candidate]:
        """The best nodes of each request that are not expanded yet."""
        price, frontier = self.price, []
        for index, tree in self._trees.items():
            growth = tree.growth
            max_rounds = min(growth.max_depth, growth.max_nodes)
            if tree.is_full or num_rounds >= max_rounds:
                continue
            rows = ROWS if self._prices is not None else -(-growth.max_nodes // max_rounds)
            depths = tree.draft.tree.depths
            open_nodes = [
                (-reach * growth.urgency, node)
                for node, reach in tree.reach.items()
                if depths[node] < growth.max_depth and reach * growth.urgency > price
            ]
            best = heapq.nsmallest(rows, open_nodes)
            frontier += [Candidate(index, node, -worth) for worth, node in best]
        return frontier

    def take(self, rounds: Rounds) -> None:
        """Open the expanded nodes, then draw every slot that is worth its price."""
        asked: dict[tuple[int, int], dict[int, int]] = {}
        for source, (_, pairs) in rounds.answers.items():
            for pair, row in pairs.items():
                if pair[0] in self._trees:
                    asked.setdefault(pair, {})[source] = row
        if not asked:
            return
        laws: dict[int, tuple[Drawable, list[list[Pick]]]] = {}
        told: dict[int, Told] = {}
        for source, (said, _) in rounds.answers.items():
            if said.picks is not None:
                told[source] = Told(said)
            else:
                drawable = Drawable.of(said.laws)
                laws[source] = drawable, drawable.likeliest(8)
        for (index, node), rows in asked.items():
            tree = self._trees[index]
            tree.places[node] = place = _Place(node, tree.reach.pop(node), {}, [])
            for source, row in rows.items():
                if source in laws:
                    drawable, tops = laws[source]
                    place.laws[source] = _Law(drawable.law(row), tops[row])
                else:
                    place.queues.append(Queue(source, told[source].row(row)))
            self._offer(index, place)
        self._draw(fill=False)

    def finish(self) -> dict[int, Grown]:
        """Fill up with the next-best slots, and learn from the sizes."""
        for tree in self._trees.values():
            tree.num_before_fill = tree.draft.tree.num_drafted
        self._draw(fill=True)
        for tree in self._trees.values():
            if self._prices is None:
                self._past.learn_threshold(tree)
            else:
                self._past.learn_size(tree)
        return {
            index: Grown(
                tree.draft.tree,
                {
                    source: (tree.draft, range(len(tree.draft.tree)))
                    for source in tree.growth.sources
                },
                tree.features,
            )
            for index, tree in self._trees.items()
        }

    def _draw(self, *, fill: bool) -> None:
        num_nodes = self.num_nodes
        price = 1.0 if self._prices is None else self.price
        while self._heap:
            if self._prices is not None:
                now = float(self._prices.nodes[min(num_nodes, len(self._prices.nodes) - 1)])
                price = now if fill else max(now, price)
            elif fill:
                price = 0.0
            if -self._heap[0][0] < price:
                return
            _, _, index, node, source = heapq.heappop(self._heap)
            tree = self._trees[index]
            if tree.is_full:
                continue
            place = tree.places[node]
            self._add(tree, place, source)
            num_nodes += 1
            self._offer(index, place)

    def _add(self, tree: _DrawnTree, place: _Place, source: int) -> None:
        """One more slot under a node, from the source that was found best before the draw."""
        growth, rank = tree.growth, len(place.seen)
        law = PICK
        if source in place.laws:
            own = place.laws[source]
            before = own.largest(place.seen)
            token, after = own.draw(growth.rng)
            law = Law(own.law.rows, own.law.row, place.seen, own.law.tokens)
        else:
            queue = next(queue for queue in place.queues if queue.source == source)
            offer = queue.next(set(place.seen))
            assert offer is not None
            token, after = offer
            before = after
        slot = len(tree.draft.tree.slots)
        child = tree.draft.tree.add(place.node, token, source=source, law=law)
        tree.features[slot] = Features(rank, before, after)
        place.seen = (*place.seen, token)
        for each in place.laws.values():
            each.strike(token)
        rate = self._values.after_one(source, growth, rank, after)
        tree.reach[child] = place.reach * rate
        place.reach *= 1.0 - rate

    def _offer(self, index: int, place: _Place) -> None:
        """Put a node's next slot on the heap, from the source that is surest before the draw."""
        tree = self._trees[index]
        growth, rank = tree.growth, len(place.seen)
        if rank >= WIDEST or place.reach < LEAST:
            return
        seen, offers = set(place.seen), []
        for source, law in place.laws.items():
            if (largest := law.largest(place.seen)) > 0:
                rate = self._values.before_one(source, growth, rank, largest)
                offers.append((rate, source))
        for queue in place.queues:
            if (offer := queue.next(seen)) is not None:
                rate = self._values.after_one(queue.source, growth, rank, offer[1])
                offers.append((rate, queue.source))
        if not offers:
            return
        rate, source = max(offers)
        key = place.reach * rate * growth.urgency / tree.threshold
        self._order += 1
        heapq.heappush(self._heap, (-key, self._order, index, place.node, source))


class PastDraws:
    """What past drawn trees teach the next ones about their size.

    thresholds  per regime and size, the value a slot must have where the size is given
    sizes       per regime, nodes a tree had where prices set its size
    """

    def __init__(self) -> None:
        self.thresholds: dict[tuple[Regime, int, int], float] = {}
        self.sizes: dict[Regime, float] = {}

    def learn_threshold(self, tree: _DrawnTree) -> None:
        """Set the next trees' threshold: about a tenth of their nodes should be left to fill."""
        left = 1.0 - tree.num_before_fill / tree.growth.max_nodes
        change = 1.05 if left == 0 else 1.0 - 0.1 * max(0.0, left - 0.1)
        self.thresholds[_size(tree.growth)] = min(0.9, max(1e-3, tree.threshold * change))

    def learn_size(self, tree: _DrawnTree) -> None:
        """Follow the number of nodes."""
        size, regime = tree.draft.tree.num_drafted, tree.growth.regime
        usual = self.sizes.get(regime, float(size))
        self.sizes[regime] = usual + 0.1 * (size - usual)


def _size(growth: Growth) -> tuple[Regime, int, int]:
    return growth.regime, growth.max_nodes, growth.max_depth
