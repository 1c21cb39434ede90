r"""The token tree: what the drafters proposed for one request, as nodes and slots.

A *node* is unique per (parent, token): one position, one K and V. A *slot* is one proposal of a
node: who proposed it, in which order, and from which law its token was really drawn. Several slots
may propose one node; a verifier subtracts each law in turn. The laws are the whole correctness
condition (docs/algorithm.md, "Predictability"): a recorded law that is not the one the token was
drawn from shifts the output.

            root "the"                 node 0, depth 0: the last committed token
           /          \
     "cat" slots 0,2   "dog" slot 1    nodes 1 and 2, depth 1; two slots propose "cat"
          |
     "sat" slot 3                      node 3, depth 2

Plain numbers and numpy rows: no device, no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specinfer.errors import LawError

Floats = npt.NDArray[np.floating[Any]]  # float32 in production, float64 in the proofs
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """π, the law a slot's token was really drawn from.

    rows    [*, columns] float32, rows sum to 1: the drafter's laws, shared by many slots
    row     which of them; -1 means a point mass at the slot's own token (see PICK)
    seen    tokens that could not be drawn (drawn before, without replacement); the rest of the row
            is renormalised
    tokens  [*, columns] int64, the token of each column, where a law was cut to some tokens before
            anything was drawn; None: columns are tokens
    """

    rows: Floats
    row: int
    seen: tuple[int, ...] = ()
    tokens: Integers | None = None

    @property
    def is_pick(self) -> bool:
        """Whether the token was picked by looking at it: then π is a point mass."""
        return self.row < 0

    def support(self) -> tuple[Integers, Floats]:
        """What may be drawn, seen or not, and its probabilities in the row: both [n]."""
        row: Floats = self.rows[self.row]
        if self.tokens is not None:
            return self.tokens[self.row], row
        tokens = np.flatnonzero(row)
        return tokens, row[tokens]

    def columns(self, tokens: Sequence[int]) -> list[int]:
        """Where some tokens stand in the row; those it has not are left out."""
        if self.tokens is None:
            return list(tokens)
        support = self.tokens[self.row]
        places = [int((support == token).argmax()) for token in tokens]
        return [at for at, token in zip(places, tokens, strict=True) if support[at] == token]

    def token(self, column: int) -> int:
        """What a column of the row stands for."""
        return column if self.tokens is None else int(self.tokens[self.row, column])

    def probability(self, tokens: Sequence[int]) -> float:
        """What some tokens have together in the row, seen or not."""
        columns = self.columns(tokens)
        return float(self.rows[self.row, columns].sum(dtype=np.float64)) if columns else 0.0

    def dense(self) -> Floats:
        """π: [columns], the rows' dtype. Not for picks.

        raises  LawError if nothing is left once `seen` is taken out
        cost    a view where nothing was seen, else O(columns)
        """
        assert not self.is_pick
        row: Floats = self.rows[self.row]
        if not self.seen:
            return row
        rest = row.copy()
        rest[self.columns(self.seen)] = 0.0
        mass = rest.sum()
        if not mass > 0:
            raise LawError("a slot was drawn without replacement from a law with nothing left")
        rest /= mass
        return rest


PICK = Law(np.zeros((0, 0), np.float32), -1)
"""The law of a token that was picked (top-k, argmax, n-gram, predicted text): a point mass."""


class Slot(NamedTuple):
    """One proposal: `parent` → `node` with that node's token, drawn from `law`.

    law is None where the drafter did not record it: only greedy and match may then verify.
    """

    parent: int
    node: int
    source: int
    law: Law | None


class TokenTree:
    """Nodes in an order in which parents come before children; node 0 is the root.

    tokens, parents, depths  one entry per node; parents[0] is -1, depths[0] is 0
    slots                    every proposal; a slot's id is its index here
    slots_of                 per node, the ids of its slots in the order a verifier examines them
    """

    __slots__ = ("_child", "depths", "parents", "slots", "slots_of", "tokens")

    def __init__(self, root_token: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
        self.depths = [0]
        self.slots: list[Slot] = []
        self.slots_of: list[list[int]] = [[]]
        self._child: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.tokens)

    @property
    def num_drafted(self) -> int:
        """Distinct drafted nodes, without the root: what budgets count."""
        return len(self.tokens) - 1

    def add(self, parent: int, token: int, *, source: int = 0, law: Law | None = PICK) -> int:
        """Append a slot under `parent` and return its node, which is made if it is new."""
        node = self._child.get((parent, token))
        if node is None:
            node = len(self.tokens)
            self._child[parent, token] = node
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.slots_of.append([])
        self.slots_of[parent].append(len(self.slots))
        self.slots.append(Slot(parent, node, source, law))
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` under `parent`, if any slot proposed it."""
        return self._child.get((parent, token))

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`; [] for the root."""
        path = []
        while node > 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def sources_of(self, node: int) -> list[int]:
        """Who proposed a drafted node, in the order the verifier examines them."""
        siblings = self.slots_of[self.parents[node]]
        return [self.slots[slot].source for slot in siblings if self.slots[slot].node == node]

    def ancestor_mask(self) -> Bools:
        """[nodes, nodes]: entry (i, j) is True where j is i or an ancestor of i."""
        mask = np.zeros((len(self), len(self)), np.bool_)
        mask[0, 0] = True
        for node in range(1, len(self)):
            mask[node] = mask[self.parents[node]]
            mask[node, node] = True
        return mask


def union(
    trees: Sequence[TokenTree], rng: np.random.Generator
) -> tuple[TokenTree, list[list[int]]]:
    """Merge trees of one root into one tree that keeps every slot with its own law.

    Equal token strings share one node. Under a node that several trees share, slots are examined
    in a random order that does not look at tokens and keeps each tree's own order (a slot drawn
    without replacement is lawful only after those drawn before it).

    raises   LawError if the trees do not hang from the same token
    returns  the merged tree, and per tree its map from own node to merged node
    source   SpecInfer §3, "merge-based speculation"; docs/algorithm.md, "Merge"
    """
    roots = {tree.tokens[0] for tree in trees}
    if len(roots) != 1:
        raise LawError(f"trees cannot be merged under different root tokens: {sorted(roots)}")
    merged = TokenTree(roots.pop())
    maps = [[0] * len(tree) for tree in trees]
    origins = [dict.fromkeys(range(len(trees)), 0)]  # per merged node: tree -> its own node
    for node, origin in enumerate(origins):  # grows while it is swept, parents first
        queues = {index: trees[index].slots_of[own] for index, own in origin.items()}
        for index, slot_id in _interleave(queues, rng):
            slot = trees[index].slots[slot_id]
            token = trees[index].tokens[slot.node]
            child = merged.add(node, token, source=slot.source, law=slot.law)
            if child == len(origins):
                origins.append({})
            origins[child][index] = slot.node
            maps[index][slot.node] = child
    return merged, maps


def _interleave(queues: dict[int, list[int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(key, item) of every queue: a uniformly random order that keeps each queue's own order."""
    queues = {key: queue for key, queue in queues.items() if queue}
    keys = [key for key, queue in queues.items() for _ in queue]
    if len(queues) > 1:
        keys = rng.permutation(keys).tolist()
    heads = {key: iter(queue) for key, queue in queues.items()}
    return [(key, next(heads[key])) for key in keys]
