"""Picked trees: tokens are chosen by looking at them, so the best of all guesses are kept.

Greedy, seeded and cold requests have point masses for slots; whatever looks at their tokens is
lawful. All such requests of a step share one pool of guesses.
"""

from collections.abc import Sequence

from specinfer.draft.calibration import Features
from specinfer.draft.growth import Grown, Growth, Guesses
from specinfer.draft.guesses import Guess, Limits, NativePool, Offer, pool_of
from specinfer.draft.rounds import (
    LEAST,
    PRICED_WIDEST,
    ROWS,
    WIDEST,
    Candidate,
    Prices,
    Queue,
    Rounds,
    Told,
    Values,
)
from specinfer.tree import Floats, Integers, TokenTree


class Picking:
    """The trees of all requests whose slots are picked.

    drafts  per request, the tree of the nodes that were expanded or offered for it
    """

    def __init__(self, growths: Sequence[Growth], values: Values, prices: Prices | None) -> None:
        self._growths = growths
        self._values = values
        self._prices = prices
        self._own = [i for i, growth in enumerate(growths) if growth.draw == "pick"]
        self.drafts = {i: growths[i].draft(TokenTree(growths[i].tokens[-1])) for i in self._own}
        self._pool = pool_of([self._limits(growths[i]) for i in self._own], values)
        self._offered: dict[tuple[int, int], Offer] = {}  # by (request, node)

    def _limits(self, growth: Growth) -> Limits:
        max_rounds = min(growth.max_depth, growth.max_nodes)
        rows = ROWS if self._prices is not None else -(-growth.max_nodes // max(1, max_rounds))
        return Limits(growth.max_depth, growth.max_nodes, max_rounds, rows, growth.urgency)

    def price(self, num_others: int) -> float:
        """What one more node costs when the best guesses so far are taken."""
        if self._prices is None:
            return 0.0
        nodes = self._prices.nodes
        return self._pool.price(nodes[min(num_others, len(nodes) - 1) :])

    def frontier(self, num_rounds: int, price: float) -> list[Candidate]:
        """The best nodes of each request that are not expanded yet."""
        frontier = []
        for offer in self._pool.frontier(num_rounds, None if self._prices is None else price):
            index = self._own[offer.request]
            self._add_node(offer)
            self._offered[index, offer.node] = offer
            worth = offer.value * self._growths[index].urgency
            frontier.append(Candidate(index, offer.node, worth))
        return frontier

    def take(self, rounds: Rounds) -> None:
        """Value what was guessed after the expanded nodes."""
        places: dict[Offer, dict[int, int]] = {}  # source -> row of its answer
        for source, (_, pairs) in rounds.answers.items():
            for pair, place in pairs.items():
                if pair in self._offered:
                    places.setdefault(self._offered[pair], {})[source] = place
        if not places:
            return
        (source, *others) = {source for by_source in places.values() for source in by_source}
        said = rounds.answers[source][0]
        if others or said.picks is not None:
            self._pool.append([offer.row for offer in places], self._from_many(rounds, places))
            return
        growths = [self._growths[self._own[offer.request]] for offer in places]
        tokens, probabilities = self._likeliest(said, growths, [p[source] for p in places.values()])
        parents = [offer.row for offer in places]
        self._pool.extend(source, growths, parents, tokens, probabilities)

    def grow_on(self, rounds: Rounds) -> bool:
        """Take all further rounds at once, where one drafter alone is asked and has kernels for it.

        For requests with a law like any other's: a history or a seed's noise changes it per node.
        """
        growths = [self._growths[index] for index in self._own]
        sources = {source for growth in growths for source in growth.sources}
        if len(growths) < len(self._growths) or len(sources) != 1 or rounds.num_rounds != 1:
            return False
        (source,) = sources
        said, _ = rounds.answers[source]
        nodes = costs = None
        if self._prices is not None:
            nodes, costs = self._prices.nodes, self._prices.rounds[source]
        if (
            said.temperature is None
            or not isinstance(self._pool, NativePool)
            or any(growth.history is not None for growth in growths)
            or not all(rounds.asked(source, index) for index in self._own)
            or (nodes is not None and costs is not None and len(nodes) != len(costs))
        ):
            return False
        most = max([min(growth.max_depth, growth.max_nodes) for growth in growths])
        growing = self._pool.growing(
            *(source, growths),
            nodes=nodes,
            costs=costs,
            width=self._width(growths),
            temperature=said.temperature,
        )
        drafts = [(self.drafts[index], self._growths[index].max_nodes) for index in self._own]
        if not rounds.grow_on(source, drafts, growing, most):
            return False
        for offer in self._pool.offered():
            self._add_node(offer)
        return True

    def finish(self, num_others: int) -> dict[int, Grown]:
        """Keep the best nodes of each request: parents are worth more than their children."""
        totals = None if self._prices is None else self._prices.totals
        if totals is not None:
            totals = totals[min(num_others, len(totals) - 1) :]
        grown = {}
        nodes: dict[int, int] = {}  # by row of the pool
        maps: list[list[int]] = []
        for row, index in enumerate(self._own):
            growth, draft = self._growths[index], self.drafts[index]
            maps.append([0, *([-1] * (len(draft.tree) - 1))])
            parts = dict.fromkeys(growth.sources, (draft, maps[row]))
            grown[index] = Grown(TokenTree(growth.tokens[-1]), parts)
            nodes[row] = 0
        for guess in self._pool.best(totals):
            each = grown[self._own[guess.request]]
            slot = len(each.tree.slots)
            node = each.tree.add(nodes[guess.parent], guess.token, source=guess.source)
            nodes[guess.row] = node
            each.features[slot] = Features(guess.rank, guess.share, guess.share)
            if guess.node > 0:
                maps[guess.request][guess.node] = node
        return grown

    def _add_node(self, offer: Offer) -> None:
        """Put a guess into its request's draft, unless an earlier offer has."""
        tree = self.drafts[self._own[offer.request]].tree
        if offer.node == len(tree):
            tree.add(offer.above, offer.token)

    def _width(self, growths: Sequence[Growth]) -> int:
        """Guesses to look at after a node."""
        widest = WIDEST if self._prices is None else PRICED_WIDEST
        return min(widest, max([growth.max_nodes for growth in growths]))

    def _likeliest(
        self, said: Guesses, growths: Sequence[Growth], places: list[int]
    ) -> tuple[Integers, Floats]:
        """What a model's laws hold likeliest: tokens and probabilities [places, width]."""
        tokens, probabilities = said.likeliest(self._width(growths))
        if len(places) == len(tokens):
            return tokens, probabilities
        return tokens[places], probabilities[places]

    def _from_many(self, rounds: Rounds, places: dict[Offer, dict[int, int]]) -> list[Guess]:
        """Guesses of several drafters: at each place the surest of what each would say next."""
        told = {source: Told(said) for source, (said, _) in rounds.answers.items()}
        new = []
        for parent, rows in places.items():
            value, growth = parent.value, self._growths[self._own[parent.request]]
            queues = [Queue(source, told[source].row(place)) for source, place in rows.items()]
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
                place = (parent.row, parent.request, token, parent.depth + 1, source, rank, 0)
                new.append(Guess(0, *place, value * rate, share))
                value *= 1.0 - rate
        return [guess for guess in new if guess.value > LEAST]
