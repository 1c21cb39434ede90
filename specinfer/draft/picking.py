"""Picked trees: tokens are chosen by looking at them, so the best of all guesses are kept.

Greedy, seeded and cold requests have point masses for slots; whatever looks at their tokens is
lawful. All such requests of a step share one pool of guesses, a numpy array, so that a batch costs
about as many operations as a single request.
"""

from collections.abc import Sequence

import numpy as np

from specinfer.draft.calibration import Features
from specinfer.draft.growth import Grown, Growth, Guesses, likeliest
from specinfer.draft.rounds import (
    LEAST,
    PRICED_WIDEST,
    ROWS,
    WIDEST,
    Candidate,
    Integers,
    Numbers,
    Prices,
    Queue,
    Rounds,
    Told,
    Values,
)
from specinfer.tree import TokenTree

# Columns of the pool: one row per guess of any picked request
_VALUE, _REQUEST, _PARENT, _TOKEN, _DEPTH, _SOURCE, _RANK, _PROBABILITY, _NODE, _OPEN = range(10)


class Picking:
    """The trees of all requests whose slots are picked: one pool of guesses, in numpy.

    drafts  per request, the tree of the nodes that were expanded or offered for it
    """

    def __init__(self, growths: Sequence[Growth], values: Values, prices: Prices | None) -> None:
        self._growths = growths
        self._values = values
        self._prices = prices
        self._own = [i for i, growth in enumerate(growths) if growth.draw == "pick"]
        self.drafts = {i: growths[i].draft(TokenTree(growths[i].tokens[-1])) for i in self._own}
        self._pool = np.zeros((len(self._own), 10))  # the roots stand first
        self._pool[:, _VALUE] = 1.0
        self._pool[:, _REQUEST] = self._own
        self._pool[:, _PARENT] = -1
        self._pool[:, _OPEN] = 1.0
        size = len(growths)
        self._max_depth = np.array([growth.max_depth for growth in growths])
        self._max_nodes = np.array([growth.max_nodes for growth in growths])
        self._urgency = np.array([growth.urgency for growth in growths])
        self._is_urgent = bool((self._urgency != 1.0).any())
        self._max_rounds = np.minimum(self._max_depth, self._max_nodes)
        self._rows = np.full(size, ROWS)
        if prices is None:
            self._rows = -(-self._max_nodes // np.maximum(1, self._max_rounds))
        self._num_nodes = np.zeros(size, np.int64)  # in the drafts
        self._where: dict[tuple[int, int], int] = {}  # (request, node) -> row of the pool

    def price(self, num_others: int) -> float:
        """What one more node costs when the best guesses so far are taken."""
        if self._prices is None:
            return 0.0
        worth = -np.sort(-self._worth()[len(self._own) :])
        nodes = self._prices.nodes
        nodes = nodes[min(num_others, len(nodes) - 1) :]
        below = worth[: len(nodes)] < nodes[: len(worth)]
        taken = int(below.argmax()) if below.any() else len(below)
        return float(nodes[min(taken, len(nodes) - 1)])

    def frontier(self, num_rounds: int, price: float) -> list[Candidate]:
        """The best nodes of each request that are not expanded yet."""
        worth = self._worth()
        may = self._pool[:, _OPEN] > 0
        if self._prices is not None:
            may &= worth > price
        rows = np.flatnonzero(may)
        request = self._pool[rows, _REQUEST].astype(np.int64)
        deep = self._pool[rows, _DEPTH] >= self._max_depth[request]
        deep |= num_rounds >= self._max_rounds[request]
        if deep.any():
            rows, request = rows[~deep], request[~deep]
        room = self._max_nodes - self._num_nodes  # drafters have pages for so many nodes
        best = _best_of_each(request, worth[rows], np.minimum(self._rows, room))
        return [
            Candidate(each, self._node(row), value)
            for each, row, value in zip(
                request[best].tolist(),
                rows[best].tolist(),
                worth[rows[best]].tolist(),
                strict=True,
            )
        ]

    def take(self, rounds: Rounds) -> None:
        """Value what was guessed after the expanded nodes."""
        rows: dict[int, dict[int, int]] = {}  # row of the pool -> source -> row of its answer
        for source, (_, places) in rounds.answers.items():
            for pair, place in places.items():
                if pair in self._where:
                    rows.setdefault(self._where[pair], {})[source] = place
        if not rows:
            return
        parents = np.array(list(rows))
        self._pool[parents, _OPEN] = 0.0
        models = {source for by_source in rows.values() for source in by_source}
        (source, *others) = models
        said = rounds.answers[source][0]
        if not others and said.laws is not None:
            new = self._from_laws(source, said, parents, [p[source] for p in rows.values()])
        else:
            new = self._from_many(rounds, rows)
        self._pool = np.concatenate((self._pool, new[new[:, _VALUE] > LEAST]))

    def finish(self, num_others: int) -> dict[int, Grown]:
        """Keep the best nodes of each request: parents are worth more than their children."""
        pool, num_roots = self._pool, len(self._own)
        worth = self._worth()[num_roots:]
        request = pool[num_roots:, _REQUEST].astype(np.int64)
        order = _best_of_each(request, worth, self._max_nodes)
        order = order[np.argsort(-worth[order], kind="stable")]
        if self._prices is not None:
            totals = self._prices.totals
            totals = totals[min(num_others, len(totals) - 1) :]
            order = order[: max(0, len(totals) - 1)]
            gains = np.concatenate(([0.0], np.cumsum(worth[order])))
            order = order[: int((gains - totals[: len(gains)]).argmax())]
        return self._trees(order + num_roots)

    def _trees(self, kept: Integers) -> dict[int, Grown]:
        grown = {}
        nodes: dict[int, int] = {}
        maps: dict[int, list[int]] = {}
        for row, index in enumerate(self._own):
            growth, draft = self._growths[index], self.drafts[index]
            maps[index] = [0, *([-1] * (len(draft.tree) - 1))]
            parts = dict.fromkeys(growth.sources, (draft, maps[index]))
            grown[index] = Grown(TokenTree(growth.tokens[-1]), parts)
            nodes[row] = 0
        columns = self._pool[kept].tolist()
        for row, column in zip(kept.tolist(), columns, strict=True):
            each = grown[int(column[_REQUEST])]
            parent, own = nodes[int(column[_PARENT])], int(column[_NODE])
            slot = len(each.tree.slots)
            node = each.tree.add(parent, int(column[_TOKEN]), source=int(column[_SOURCE]))
            nodes[row] = node
            probability = column[_PROBABILITY]
            each.features[slot] = Features(int(column[_RANK]), probability, probability)
            if own > 0:
                maps[int(column[_REQUEST])][own] = node
        return grown

    def _worth(self) -> Numbers:
        """[rows]: values, weighed by urgency."""
        worth: Numbers = self._pool[:, _VALUE]
        if self._is_urgent:
            worth = worth * self._urgency[self._pool[:, _REQUEST].astype(np.int64)]
        return worth

    def _node(self, row: int) -> int:
        """The node of a guess in its request's draft, added where it is first offered."""
        entry = self._pool[row]
        if row >= len(self._own) and entry[_NODE] == 0:
            tree = self.drafts[int(entry[_REQUEST])].tree
            parent = self._pool[int(entry[_PARENT]), _NODE]
            entry[_NODE] = tree.add(int(parent), int(entry[_TOKEN]))
            self._num_nodes[int(entry[_REQUEST])] += 1
        self._where[int(entry[_REQUEST]), int(entry[_NODE])] = row
        return int(entry[_NODE])

    def _from_laws(
        self, source: int, said: Guesses, parents: Integers, places: list[int]
    ) -> Numbers:
        """Guesses of one model, likeliest first: [parents · width, columns]."""
        assert said.laws is not None
        laws = said.laws if len(places) == len(said.laws) else said.laws[places]
        request = self._pool[parents, _REQUEST].astype(np.int64)
        widest = WIDEST if self._prices is None else PRICED_WIDEST
        width = int(min(widest, self._max_nodes[request].max()))
        tokens, probabilities = likeliest(laws, width)
        probabilities = probabilities.astype(np.float64)
        left = 1.0 - np.cumsum(probabilities, -1) + probabilities
        shares = np.zeros_like(probabilities)  # what a law cannot draw has no share of nothing
        np.divide(
            probabilities, np.maximum(left, probabilities), out=shares, where=probabilities > 0
        )
        ranks: Integers = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        growths = [self._growths[index] for index in request.tolist()]
        rates = self._values.after(source, growths, ranks, shares)
        rates = np.where(probabilities > 0, rates, 0.0)
        missed = np.ones_like(rates)
        np.cumprod(1.0 - rates[:, :-1], -1, out=missed[:, 1:])
        new = np.zeros((*tokens.shape, 10))
        new[..., _VALUE] = self._pool[parents, _VALUE][:, None] * missed * rates
        new[..., _REQUEST] = request[:, None]
        new[..., _PARENT] = parents[:, None]
        new[..., _TOKEN] = tokens
        new[..., _DEPTH] = self._pool[parents, _DEPTH][:, None] + 1
        new[..., _SOURCE] = source
        new[..., _RANK] = ranks
        new[..., _PROBABILITY] = shares
        new[..., _OPEN] = 1.0
        return new.reshape(-1, 10)

    def _from_many(self, rounds: Rounds, rows: dict[int, dict[int, int]]) -> Numbers:
        """Guesses of several drafters: at each place the surest of what each would say next."""
        told = {source: Told(said) for source, (said, _) in rounds.answers.items()}
        new = []
        for parent, places in rows.items():
            value, index, depth = self._pool[parent][[_VALUE, _REQUEST, _DEPTH]].tolist()
            growth = self._growths[int(index)]
            queues = [Queue(source, told[source].row(place)) for source, place in places.items()]
            seen: set[int] = set()
            for rank in range(min(WIDEST, growth.max_nodes)):
                offers = []
                for queue in queues:
                    if (offer := queue.next(seen)) is not None:
                        rate = self._values.after_one(queue.source, growth, rank, offer[1])
                        offers.append((rate, *offer, queue.source))
                if not offers or value < LEAST:
                    break
                rate, token, share, source = max(offers, key=lambda offer: offer[0])
                seen.add(token)
                new.append(
                    (value * rate, index, parent, token, depth + 1, source, rank, share, 0, 1)
                )
                value *= 1.0 - rate
        return np.array(new, np.float64).reshape(-1, 10)


def _best_of_each(request: Integers, worth: Numbers, counts: Integers) -> Integers:
    """The best `counts[request]` rows of each request; the older first among equals."""
    if len(request) == 0 or (len(counts) == 1 and len(request) <= counts[0]):
        return np.argsort(-worth, kind="stable")
    order = np.lexsort((-worth, request))
    sorted_request = request[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_request, sorted_request)
    return order[place < counts[sorted_request]]
