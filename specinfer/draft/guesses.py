"""The pool of guesses that picked trees are grown from: in numpy, and by our kernels.

A guess is a token after an expanded node, and the chance that it is accepted. One pool holds those
of all picked requests of a step, so that a batch costs about as many operations as one request.
Guesses are rows, the requests' roots first; requests are told apart by their places in the pool.
"""

import ctypes
import struct
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from specinfer.draft.growth import Growth
from specinfer.draft.rounds import LEAST, Numbers, Values
from specinfer.ops.native import Growing, Kernels, address, kernels
from specinfer.tree import Floats, Integers


class Limits(NamedTuple):
    """What one request's tree may be.

    rows  nodes of it that one round expands at most
    """

    max_depth: int
    max_nodes: int
    max_rounds: int
    rows: int
    urgency: float


class Offer(NamedTuple):
    """A guess that may be expanded.

    node   in its request's draft, from 1 on in the order of offers; 0 for a root
    above  the node it hangs from
    """

    row: int
    request: int
    node: int
    above: int
    token: int
    depth: int
    value: float


class Guess(NamedTuple):
    """A guess in the pool, or one to be put there.

    parent  the row it hangs from
    share   its probability among what its drafter had left
    node    in its request's draft; 0: it was never offered
    """

    row: int
    parent: int
    request: int
    token: int
    depth: int
    source: int
    rank: int
    node: int
    value: float
    share: float


class Pool(Protocol):
    """Guesses, grown in rounds."""

    def price(self, nodes: Numbers) -> float:
        """What one more node costs when the best guesses so far are taken.

        nodes  [stop] what it costs where there are 0, 1, … already
        """
        ...

    def frontier(self, num_rounds: int, price: float | None) -> list[Offer]:
        """The best guesses of each request that are not expanded yet, by request.

        price  that they must be worth; None: none
        """
        ...

    def extend(
        self,
        source: int,
        growths: Sequence[Growth],
        parents: Sequence[int],
        tokens: Integers,
        probabilities: Floats,
    ) -> None:
        """Put in what one drafter said after expanded guesses.

        growths        whose they are, one for each
        tokens         [parents, width], the likeliest first
        probabilities  [parents, width] float32; 0: it says no more
        """
        ...

    def append(self, parents: Sequence[int], guesses: Sequence[Guess]) -> None:
        """Put in guesses that are valued already, after expanded ones."""
        ...

    def best(self, totals: Numbers | None) -> list[Guess]:
        """The guesses to keep, parents before children, since they are worth more.

        totals  [stop] what 0, 1, … nodes cost together; None: nothing
        """
        ...


def pool_of(limits: Sequence[Limits], values: Values) -> Pool:
    """A pool of so many requests, with their roots in it."""
    found = kernels()
    return NumpyPool(limits, values) if found is None else NativePool(limits, values, found)


# The structures of ops/native/guesses.h, field by field
_REQUEST = struct.Struct("=4qdq")
_OFFER = struct.Struct("=6qd")
_GUESS = struct.Struct("=8q2d")


class NativePool:
    """The pool by ops/native/guesses.h."""

    def __init__(self, limits: Sequence[Limits], values: Values, found: Kernels) -> None:
        self._values = values
        self._kernels = found
        requests = b"".join([_REQUEST.pack(*each, 0) for each in limits])
        self._pool = found.pool_new(requests, len(limits))
        weakref.finalize(self, found.pool_free, self._pool)
        most = sum([each.max_nodes for each in limits])
        self._found = ctypes.create_string_buffer(_GUESS.size * (most + len(limits)))

    def price(self, nodes: Numbers) -> float:
        """See `Pool.price`."""
        return self._kernels.pool_price(self._pool, address(nodes), len(nodes))  # type: ignore[no-any-return]

    def frontier(self, num_rounds: int, price: float | None) -> list[Offer]:
        """See `Pool.frontier`."""
        count = self._kernels.pool_frontier(
            self._pool, num_rounds, price or 0.0, price is not None, self._found
        )
        return [Offer._make(each) for each in self._read(_OFFER, count)]

    def extend(
        self,
        source: int,
        growths: Sequence[Growth],
        parents: Sequence[int],
        tokens: Integers,
        probabilities: Floats,
    ) -> None:
        """See `Pool.extend`."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        probabilities = np.ascontiguousarray(probabilities, np.float32)
        rows = array("q", parents)
        self._kernels.pool_extend(
            *(self._pool, rows.buffer_info()[0], len(rows), address(tokens)),
            *(address(probabilities), tokens.shape[1], source),
            *(self._values.curves(source, growths), LEAST),
        )

    def append(self, parents: Sequence[int], guesses: Sequence[Guess]) -> None:
        """See `Pool.append`."""
        above, rows = array("q", parents), b"".join([_GUESS.pack(*each) for each in guesses])
        self._kernels.pool_append(
            self._pool, above.buffer_info()[0], len(above), rows, len(guesses)
        )

    def best(self, totals: Numbers | None) -> list[Guess]:
        """See `Pool.best`."""
        where, stop = (None, 0) if totals is None else (address(totals), len(totals))
        count = self._kernels.pool_best(self._pool, where, stop, self._found)
        return [Guess._make(each) for each in self._read(_GUESS, count)]

    def growing(
        self,
        source: int,
        growths: Sequence[Growth],
        *,
        nodes: Numbers | None,
        costs: Numbers | None,
        width: int,
        temperature: float,
    ) -> Growing:
        """What a drafter needs to grow on by itself: see ops/native/growth.h.

        nodes, costs  [stop] prices of one more node, and of a pass over 0, 1, … nodes; None: none
        width         guesses that are taken after a node
        """
        return Growing(
            pool=self._pool,
            nodes=None if nodes is None else address(nodes),
            costs=None if costs is None else address(costs),
            num_prices=0 if nodes is None else len(nodes),
            curves=self._values.curves(source, growths),
            num_requests=len(growths),
            source=source,
            width=width,
            scale=1.0 / temperature,
            least=LEAST,
        )

    def offered(self) -> list[Offer]:
        """Every guess that has a node, by request and node."""
        count = self._kernels.pool_offered(self._pool, self._found)
        return [Offer._make(each) for each in self._read(_OFFER, count)]

    def _read(self, kind: struct.Struct, count: int) -> Iterator[tuple[Any, ...]]:
        return kind.iter_unpack(memoryview(self._found)[: count * kind.size])


# The columns of the numpy pool: a guess's fields behind its row, and whether it may be expanded
_PARENT, _REQUEST_OF, _TOKEN, _DEPTH, _SOURCE, _RANK, _NODE, _VALUE, _SHARE, _OPEN = range(10)


class NumpyPool:
    """The same in numpy: a row per guess."""

    def __init__(self, limits: Sequence[Limits], values: Values) -> None:
        self._values = values
        self._size = len(limits)
        columns = np.array(limits, np.float64).reshape(-1, len(Limits._fields)).T
        whole = columns[:-1].astype(np.int64)
        self._max_depth, self._max_nodes, self._max_rounds, self._most = whole
        self._urgency = columns[-1]
        self._is_urgent = bool((self._urgency != 1.0).any())
        self._num_nodes = np.zeros(self._size, np.int64)  # in the drafts
        self._rows = np.zeros((self._size, 10))  # the roots stand first
        self._rows[:, _VALUE] = 1.0
        self._rows[:, _REQUEST_OF] = range(self._size)
        self._rows[:, _PARENT] = -1
        self._rows[:, _OPEN] = 1.0

    def price(self, nodes: Numbers) -> float:
        """See `Pool.price`."""
        worth = -np.sort(-self._worth()[self._size :])
        below = worth[: len(nodes)] < nodes[: len(worth)]
        taken = int(below.argmax()) if below.any() else len(below)
        return float(nodes[min(taken, len(nodes) - 1)])

    def frontier(self, num_rounds: int, price: float | None) -> list[Offer]:
        """See `Pool.frontier`."""
        worth = self._worth()
        may = self._rows[:, _OPEN] > 0
        if price is not None:
            may &= worth > price
        rows = np.flatnonzero(may)
        request = self._request(rows)
        deep = self._rows[rows, _DEPTH] >= self._max_depth[request]
        deep |= num_rounds >= self._max_rounds[request]
        rows, request = rows[~deep], request[~deep]
        room = self._max_nodes - self._num_nodes  # drafters have pages for so many nodes
        best = _best_of_each(request, worth[rows], np.minimum(self._most, room))
        return [self._offer(row) for row in rows[best].tolist()]

    def extend(
        self,
        source: int,
        growths: Sequence[Growth],
        parents: Sequence[int],
        tokens: Integers,
        probabilities: Floats,
    ) -> None:
        """See `Pool.extend`."""
        above = np.array(parents)
        self._rows[above, _OPEN] = 0.0
        probabilities = np.asarray(probabilities, np.float64)
        left = 1.0 - np.cumsum(probabilities, -1) + probabilities
        shares: Numbers = np.zeros(tokens.shape)  # what a law cannot draw has no share of nothing
        np.divide(
            probabilities, np.maximum(left, probabilities), out=shares, where=probabilities > 0
        )
        ranks: Integers = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        rates = self._values.after(source, growths, ranks, shares)
        rates = np.where(probabilities > 0, rates, 0.0)
        missed = np.ones_like(rates)
        np.cumprod(1.0 - rates[:, :-1], -1, out=missed[:, 1:])
        new = np.zeros((*tokens.shape, 10))
        new[..., _VALUE] = self._rows[above, _VALUE][:, None] * missed * rates
        new[..., _REQUEST_OF] = self._rows[above, _REQUEST_OF][:, None]
        new[..., _PARENT] = above[:, None]
        new[..., _TOKEN] = tokens
        new[..., _DEPTH] = self._rows[above, _DEPTH][:, None] + 1
        new[..., _SOURCE] = source
        new[..., _RANK] = ranks
        new[..., _SHARE] = shares
        new[..., _OPEN] = 1.0
        self._add(new.reshape(-1, 10)[new[..., _VALUE].ravel() > LEAST])

    def append(self, parents: Sequence[int], guesses: Sequence[Guess]) -> None:
        """See `Pool.append`."""
        self._rows[list(parents), _OPEN] = 0.0
        new = np.zeros((len(guesses), 10))
        for row, each in zip(new, guesses, strict=True):
            row[:] = (*each[1:], 1)
        self._add(new)

    def best(self, totals: Numbers | None) -> list[Guess]:
        """See `Pool.best`."""
        worth = self._worth()[self._size :]
        order = _best_of_each(self._request(slice(self._size, None)), worth, self._max_nodes)
        order = order[np.argsort(-worth[order], kind="stable")]
        if totals is not None:
            order = order[: max(0, len(totals) - 1)]
            gains = np.concatenate(([0.0], np.cumsum(worth[order])))
            order = order[: int((gains - totals[: len(gains)]).argmax())]
        return [self._guess(row) for row in (order + self._size).tolist()]

    def _worth(self) -> Numbers:
        """[rows]: values, weighed by urgency."""
        worth: Numbers = self._rows[:, _VALUE]
        return worth * self._urgency[self._request(slice(None))] if self._is_urgent else worth

    def _request(self, rows: Integers | slice) -> Integers:
        return self._rows[rows, _REQUEST_OF].astype(np.int64)

    def _add(self, new: Numbers) -> None:
        self._rows = np.concatenate((self._rows, new))

    def _offer(self, row: int) -> Offer:
        """A guess with its node, which it gets where it is first offered."""
        guess = self._guess(row)
        node = guess.node
        if guess.parent >= 0 and node == 0:
            self._num_nodes[guess.request] += 1
            self._rows[row, _NODE] = node = int(self._num_nodes[guess.request])
        above = -1 if guess.parent < 0 else int(self._rows[guess.parent, _NODE])
        return Offer(row, guess.request, node, above, guess.token, guess.depth, guess.value)

    def _guess(self, row: int) -> Guess:
        *whole, value, share, _ = self._rows[row].tolist()
        return Guess._make((row, *map(int, whole), value, share))


def _best_of_each(request: Integers, worth: Numbers, counts: Integers) -> Integers:
    """The best `counts[request]` rows of each request; the older first among equals."""
    order = np.lexsort((-worth, request))
    sorted_request = request[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_request, sorted_request)
    return order[place < counts[sorted_request]]
