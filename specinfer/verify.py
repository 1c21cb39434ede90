"""Verification: which part of a drafted tree the target would have produced itself.

Three rules, each exact: the emitted tokens follow the target's law whatever the drafters are worth
(proven by enumeration in tests/test_verify.py; the mathematics in docs/algorithm.md).

    match      draw from p, follow if drafted      any tree; greedy: `follow` the argmax of p
    topdown    SpecInfer's multi-step sampling     slots with laws; siblings one after the other
    traversal  leaves first, then back up          slots with laws; never seen below topdown

Pure functions of (tree, p, generator): no state, no device. Rules kept to be measured against are
in baselines.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specinfer.errors import LawError
from specinfer.sampling import coin, draw
from specinfer.tree import Floats, TokenTree

UNDERFLOW = 1e-12
"""A residual with less mass than this is rounding: in exact arithmetic there is none."""

_LITTLE_LEFT = 0.05
"""Below this, what is left of a law is written out and summed: 1 minus what was seen would multiply
rounding, and dividing by it might overflow."""

_INDEPENDENT = ("kseq", "gbv")


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
    cost    four passes over the vocabulary per rejected slot with a dense law, none per rejected
            pick; one draw. Laws of nodes that are not visited are not read
    """
    require_lawful(tree, "topdown", p.shape[-1])
    examined: list[tuple[int, float]] = []
    spare: list[Floats] = []
    node, child = -1, 0
    while node != child:
        node, residual = child, _Residual(p[child], spare)
        for slot_id in tree.slots_of[node]:
            slot_node, token, row, left = _open(tree, slot_id)
            ratio = residual.ratio(token, row, left)
            examined.append((slot_id, min(1.0, ratio)))
            if coin(ratio, rng) or (not residual.subtract(1.0, token, row, left) and ratio > 0):
                child = slot_node  # either accepted, or rejecting it was impossible
                residual.release()
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
    cost    as `verify_topdown`; laws are read only as far as the walk comes. Recursion as deep
            as the tree
    """
    require_lawful(tree, "traversal", p.shape[-1])
    examined: list[tuple[int, float]] = []
    spare: list[Floats] = []

    def visit(node: int, w: float) -> tuple[int, int] | None:
        """Accept here or below with probability exactly w: (last accepted node, next token)."""
        residual = _Residual(p[node], spare)
        for slot_id in tree.slots_of[node]:
            slot_node, token, row, left = _open(tree, slot_id)
            ratio = residual.ratio(token, row, left)
            examined.append((slot_id, min(1.0, ratio)))
            if ratio > 0 and (found := visit(slot_node, min(1.0, w * ratio))):
                return found
            rest = residual.subtract(w, token, row, left)
            if rest > 0:
                w = rest / (rest + (1.0 - w))
            elif w < 1.0:
                residual.release()
                return None  # the slots so far used all of w up
            elif ratio > 0:
                return visit(slot_node, 1.0)  # rejecting it was impossible
        if coin(w, rng):
            return node, residual.draw(rng)
        residual.release()
        return None

    found = visit(0, 1.0)
    assert found is not None, "a visit with w = 1 always accepts"
    return Verdict(tree.path(found[0]), found[1], examined)


def _open(tree: TokenTree, slot_id: int) -> tuple[int, int, Floats | None, float]:
    """(node, token, row, left) of a slot: π = row / left on what could be drawn.

    row   [vocab]; None for a point mass
    left  the row's mass without the tokens that could not be drawn
    """
    _, node, _, law = tree.slots[slot_id]
    assert law is not None
    token = tree.tokens[node]
    if law.row < 0:
        return node, token, None, 1.0
    row, left = law.rows[law.row], 1.0
    if law.seen:
        left -= float(row[list(law.seen)].sum(dtype=np.float64))  # its whole mass is 1 by contract
        if left < _LITTLE_LEFT:
            return node, token, law.dense(), 1.0
    return node, token, row, left


def _total(weights: Floats) -> float:
    """Their sum; einsum takes half of `sum`'s time and errs as little (1e-7 at 128k)."""
    return float(np.einsum("i->", weights))


class _Residual:
    """M, what the target still owes at one node after the rejected slots: weights / mass.

    The weights keep the scale of p, so that a law is scaled and subtracted at once. Picks are only
    struck off until a dense law has to be subtracted. Never adds mass: a token with M = 0 keeps it.

    spare    buffers [vocab] that nobody uses, shared along one verification
    counted  the mass when it was last summed, against cancellation
    """

    __slots__ = ("counted", "mass", "owned", "spare", "struck", "weights")

    def __init__(self, p: Floats, spare: list[Floats]) -> None:
        self.weights = p
        self.mass = self.counted = 1.0
        self.struck: list[int] = []
        self.spare = spare
        self.owned = False  # the weights are p itself

    def ratio(self, token: int, row: Floats | None, left: float) -> float:
        """M[x] / π[x]."""
        if token in self.struck:
            return 0.0
        share = float(self.weights[token]) / self.mass
        return share if row is None else share * left / float(row[token])

    def subtract(self, w: float, token: int, row: Floats | None, left: float) -> float:
        """A rejected slot: M becomes R / S for R = max(0, w·M - π) and S = sum(R); returns S.

        Where S underflows, returns 0.0 and M stays as it was. Tokens that π could not draw were
        rejected before, so that their M is 0 and nothing can be taken from them.
        """
        if row is None:
            return self._strike(w, token)
        if w < UNDERFLOW:
            return 0.0
        rest = self._buffer()
        scale = self.mass / (w * left)
        spent = row if scale == 1.0 else np.multiply(row, scale, out=rest)
        # W - min(W, ·), as numpy compares two rows four times as fast as a row and a number
        np.minimum(self.weights, spent, out=rest)
        np.subtract(self.weights, rest, out=rest)
        rest[[*self.struck, token]] = 0.0  # rejected, so 0 but for rounding
        mass = _total(rest)
        kept = w * mass / self.mass
        if kept < UNDERFLOW:
            self.spare.append(rest)
            return 0.0
        self.release()
        self.weights, self.mass, self.counted, self.struck = rest, mass, mass, []
        self.owned = True
        return kept

    def _strike(self, w: float, token: int) -> float:
        if token in self.struck:
            return w
        self.struck.append(token)
        mass, counted = self.mass - float(self.weights[token]), self.counted
        if mass < 1e-3 * counted:  # mostly rounding by now: sum what is really left
            mass = counted = _total(self._dense())
        if w * mass / self.mass < UNDERFLOW:
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

    def release(self) -> None:
        """Give the weights' buffer to whoever needs one next."""
        if self.owned:
            self.spare.append(self.weights)
            self.owned = False

    def _buffer(self) -> Floats:
        return self.spare.pop() if self.spare else np.empty_like(self.weights)


def require_lawful(tree: TokenTree, verifier: str, vocab: int) -> None:
    """Refuse a tree whose slots do not suit the verifier.

    verifier  "greedy" and "match" take any tree, "topdown" and "traversal" need every slot's law,
              "kseq" and "gbv" one law per node, of which all its slots are independent draws
    vocab     of the target's law
    raises    LawError for a law that is missing, of another vocabulary, without the slot's own
              token, without replacement of tokens that no earlier sibling has, or not shared
    limits    whether a token was chosen by looking at it cannot be seen here: record it as PICK
    cost      O(slots) on the host
    """
    if verifier not in ("topdown", "traversal", *_INDEPENDENT):
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
            if law.is_pick:
                earlier.add(token)
                continue
            if law.rows.shape[-1] != vocab:
                raise LawError(
                    f"slot {slot_id} has a law over {law.rows.shape[-1]} tokens and the target's "
                    f"has {vocab}: cut or pad the drafter's laws"
                )
            if token in law.seen or not law.rows[law.row, token] > 0:
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
        if verifier in _INDEPENDENT:
            _require_shared_law(tree, siblings, verifier)


def _require_shared_law(tree: TokenTree, siblings: Sequence[int], verifier: str) -> None:
    for slot_id in siblings:
        law, first = tree.slots[slot_id].law, tree.slots[siblings[0]].law
        assert law is not None
        assert first is not None
        if law.is_pick:
            how = "was picked"
        elif law.seen:
            how = "was drawn without replacement"
        elif (law.rows is not first.rows) or law.row != first.row:
            how = "was drawn from another law than its siblings"
        else:
            continue
        raise LawError(
            f"{verifier} needs all slots of a node drawn independently from one law and slot "
            f'{slot_id} {how}: use one drafter and draw="iid", or verifier="traversal"'
        )
