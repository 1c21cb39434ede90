"""Verification: which part of a drafted tree the target would have produced itself.

Four rules, each exact: the emitted tokens follow the target's law whatever the drafters are worth
(proven by enumeration in tests/test_verify.py; the mathematics in docs/algorithm.md).

    greedy     follow the argmax of p              any tree
    match      draw from p, follow if drafted      any tree
    topdown    SpecInfer's multi-step sampling     slots with laws; siblings one after the other
    traversal  leaves first, then back up          slots with laws; never seen below topdown

Pure functions of (tree, p, generator): no state, no device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specinfer.errors import LawError
from specinfer.sampling import coin, draw
from specinfer.tree import Floats, Slot, TokenTree

_UNDERFLOW = 1e-12
"""A residual with less mass than this is rounding: in exact arithmetic there is none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification decided.

    path        the accepted nodes from the root's child down, without the root
    next_token  the token the target adds after them
    examined    (slot id, min(1, M[x] / π[x])) for each slot looked at, in that order: an unbiased
                sample of "accepted, given that it was reached". Greedy and match see only whether
                the slot carries the target's token: 1.0 or 0.0
    """

    path: list[int]
    next_token: int
    examined: list[tuple[int, float]]


def follow(tree: TokenTree, picks: Sequence[int] | npt.NDArray[np.int64]) -> Verdict:
    """Accept as far as the tree carries the target's own tokens.

    picks  [nodes]: per node the token that the target puts after it; drawn from p at that node
           (match), its argmax (greedy), or the seeded pick. Unvisited nodes' picks are not read
    law    that of the picks, for any tree
    cost   O(slots on the path)
    """
    return _follow(tree, lambda node: int(picks[node]))


def _follow(tree: TokenTree, pick: Callable[[int], int]) -> Verdict:
    node, examined = 0, []
    while True:
        token = pick(node)
        child = tree.child(node, token)
        for slot_id in tree.slots_of[node]:
            examined.append((slot_id, float(tree.slots[slot_id].node == child)))
            if tree.slots[slot_id].node == child:
                break
        if child is None:
            return Verdict(tree.path(node), token, examined)
        node = child


def verify_greedy(tree: TokenTree, p: Floats) -> Verdict:
    """Accept as long as the tree carries the likeliest token (the lowest id among equals).

    p     [nodes, vocab]: the target's law after each node
    cost  O(vocab) per visited node
    """
    return _follow(tree, lambda node: int(p[node].argmax()))


def verify_match(tree: TokenTree, p: Floats, rng: np.random.Generator) -> Verdict:
    """Draw from the target at each node; go on where the tree carries the token.

    p       [nodes, vocab] float32, rows sum to 1: the target's law after each node
    law     P(tokens) = p for any tree, laws recorded or not
    source  "naive sampling" in SpecInfer §4.3; SpecExec; EAGLE-2
    cost    one draw per visited node
    """
    return _follow(tree, lambda node: draw(p[node], rng))


def verify_topdown(tree: TokenTree, p: Floats, rng: np.random.Generator) -> Verdict:
    """Offer a node's slots to the target one after the other; go down where one is accepted.

    p       [nodes, vocab] float32, rows sum to 1: the target's law after each node
    raises  LawError if a slot's law is missing or cannot have been what its token was drawn from
    law     P(tokens) = p for any drafters, to the rounding of the laws
    source  SpecInfer (arXiv 2305.09781), algorithm 2; without replacement: RSD, Sequoia. That
            algorithm picks the next slot at random: here the tree's order is that choice, as one
            drafter's i.i.d. slots are exchangeable and `tree.union` shuffles those of several
    cost    O(vocab) per rejected slot with a dense law, O(1) per rejected pick; one draw
    """
    require_lawful(tree, "topdown", p.shape[-1])
    examined: list[tuple[int, float]] = []
    node, child = -1, 0
    while node != child:
        node, residual = child, _Residual(p[child])
        for slot_id in tree.slots_of[node]:
            slot, token, law = _open(tree, slot_id)
            ratio = residual.ratio(token, law)
            examined.append((slot_id, min(1.0, ratio)))
            if coin(ratio, rng) or (not residual.subtract(1.0, token, law) and ratio > 0):
                child = slot.node  # either accepted, or rejecting it was impossible
                break
    return Verdict(tree.path(node), residual.draw(rng), examined)


def verify_traversal(tree: TokenTree, p: Floats, rng: np.random.Generator) -> Verdict:
    """Try the deepest nodes first: accept at or below a node with exactly the chance it deserves.

    p       [nodes, vocab] float32, rows sum to 1: the target's law after each node
    raises  LawError as `verify_topdown`
    law     P(tokens) = p for any drafters, to the rounding of the laws
    source  Traversal Verification (Weng et al. 2025), for slots; on a chain it is Block
            Verification, on picks it is match. `examined` holds slots of dropped branches too,
            with M as traversal has it there
    cost    O(vocab) per rejected slot with a dense law, O(1) per rejected pick; one draw.
            Recursion as deep as the tree
    """
    require_lawful(tree, "traversal", p.shape[-1])
    examined: list[tuple[int, float]] = []

    def visit(node: int, w: float) -> tuple[int, int] | None:
        """Accept here or below with probability exactly w: (last accepted node, next token)."""
        residual = _Residual(p[node])
        for slot_id in tree.slots_of[node]:
            slot, token, law = _open(tree, slot_id)
            ratio = residual.ratio(token, law)
            examined.append((slot_id, min(1.0, ratio)))
            if ratio > 0 and (found := visit(slot.node, min(1.0, w * ratio))):
                return found
            rest = residual.subtract(w, token, law)
            if rest > 0:
                w = rest / (rest + (1.0 - w))
            elif w < 1.0:
                return None  # the slots so far used all of w up
            elif ratio > 0:
                return visit(slot.node, 1.0)  # rejecting it was impossible
        return (node, residual.draw(rng)) if coin(w, rng) else None

    found = visit(0, 1.0)
    assert found is not None, "a visit with w = 1 always accepts"
    return Verdict(tree.path(found[0]), found[1], examined)


class _Residual:
    """M, what the target still owes at one node after the rejected slots: weights / mass.

    Picks are only struck off until a dense law has to be subtracted. Never adds mass: a token with
    M = 0 keeps it. `counted` is the mass when it was last summed, against cancellation.
    """

    __slots__ = ("counted", "mass", "struck", "weights")

    def __init__(self, p: Floats) -> None:
        self.weights = p
        self.mass = self.counted = 1.0
        self.struck: list[int] = []

    def ratio(self, token: int, law: Floats | None) -> float:
        """M[x] / π[x]; law None is a point mass."""
        if token in self.struck:
            return 0.0
        share = float(self.weights[token]) / self.mass
        return share if law is None else share / float(law[token])

    def subtract(self, w: float, token: int, law: Floats | None) -> float:
        """M becomes R / S for R = max(0, w·M - π) and S = sum(R); returns S.

        Where S underflows, returns 0.0 and M stays as it was.
        """
        if law is None:
            return self._strike(w, token)
        rest = self.weights * (w / self.mass)
        rest[self.struck] = 0.0
        rest -= law
        np.maximum(rest, 0.0, out=rest)
        mass = float(rest.sum())
        if mass < _UNDERFLOW:
            return 0.0
        self.weights, self.mass, self.counted, self.struck = rest, mass, mass, []
        return mass

    def _strike(self, w: float, token: int) -> float:
        if token in self.struck:
            return w
        self.struck.append(token)
        mass, counted = self.mass - float(self.weights[token]), self.counted
        if mass < 1e-3 * counted:  # mostly rounding by now: sum what is really left
            mass = counted = float(self._dense().sum())
        if w * mass / self.mass < _UNDERFLOW:
            self.struck.pop()
            return 0.0
        share = mass / self.mass
        self.mass, self.counted = mass, counted
        return w * share

    def _dense(self) -> Floats:
        if not self.struck:
            return self.weights
        weights = self.weights.copy()
        weights[self.struck] = 0.0
        return weights

    def draw(self, rng: np.random.Generator) -> int:
        """A token from M."""
        return draw(self._dense(), rng)


def require_lawful(tree: TokenTree, verifier: str, vocab: int) -> None:
    """Refuse a tree whose slots do not suit the verifier.

    verifier  "greedy" and "match" take any tree, "topdown" and "traversal" need every slot's law
    vocab     of the target's law
    raises    LawError for a law that is missing, of another vocabulary, without the slot's own
              token, or without replacement of tokens that no earlier sibling has
    limits    whether a token was chosen by looking at it cannot be seen here: record it as PICK
    cost      O(slots) on the host
    """
    if verifier not in ("topdown", "traversal"):
        return
    for siblings in tree.slots_of:
        earlier: set[int] = set()
        for slot_id in siblings:
            slot = tree.slots[slot_id]
            law, token = slot.law, tree.tokens[slot.node]
            if law is None:
                raise LawError(
                    f"{verifier} needs the law of each slot and slot {slot_id} has none: "
                    'record it, or use verifier="match"'
                )
            if not 0 <= token < vocab:
                raise LawError(
                    f"slot {slot_id} carries token {token}, which the target's vocabulary of "
                    f"{vocab} does not have: drop it while drafting"
                )
            if not law.is_pick and law.rows.shape[-1] != vocab:
                raise LawError(
                    f"slot {slot_id} has a law over {law.rows.shape[-1]} tokens and the target's "
                    f"has {vocab}: cut or pad the drafter's laws"
                )
            if not law.is_pick and (token in law.seen or not law.rows[law.row, token] > 0):
                raise LawError(
                    f"slot {slot_id} carries token {token}, which its law cannot draw: "
                    "record the law it was drawn from, or PICK"
                )
            if not earlier.issuperset(law.seen):
                raise LawError(
                    f"slot {slot_id} was drawn without replacement of tokens that no earlier "
                    "sibling has: keep siblings in the order they were drawn"
                )
            earlier.add(token)


def _open(tree: TokenTree, slot_id: int) -> tuple[Slot, int, Floats | None]:
    """A slot, its token, and its law over the vocabulary: None for a point mass."""
    slot = tree.slots[slot_id]
    assert slot.law is not None
    return slot, tree.tokens[slot.node], None if slot.law.is_pick else slot.law.dense()
