"""Verifiers from the literature, kept to be measured against: exact, never the default.

    kseq  K-SEQ (SpecTr)                            a node's slots share one acceptance scale ρ
    gbv   greedy multi-path block verification      the best-ranked slot of each node, as one chain

Both know only slots drawn independently from one law per node, and refuse everything else.
`verify_traversal` takes any tree and accepts more; docs/algorithm.md, "Baselines".
"""

import math

import numpy as np
import numpy.typing as npt

from specinfer.sampling import coin, draw
from specinfer.tree import Floats, Law, TokenTree
from specinfer.verify import UNDERFLOW, Verdict, require_lawful, verify_traversal


def verify_kseq(tree: TokenTree, p: Floats, rng: np.random.Generator) -> Verdict:
    """Accept a node's slots one after the other, each with probability p / (ρ·q).

    p       [nodes, vocab] float32, rows sum to 1: the target's law after each node
    raises  LawError unless each node's slots were drawn independently from one law
    law     P(tokens) = p, to the rounding of the laws; exact for any ρ whose residual is not
            negative
    source  K-SEQ in SpecTr (Sun et al. 2023, arXiv 2310.15141), at each node of a tree
    cost    about 25 passes over the vocabulary per visited node, to find ρ in float32
    """
    require_lawful(tree, "kseq", p.shape[-1])
    examined: list[tuple[int, float]] = []
    node = 0
    while siblings := tree.slots_of[node]:
        law, (q, k) = p[node], _shared(tree, node)
        scale = _scale(law, q, k)
        accepted = possible = None
        for slot_id in siblings:
            child = tree.slots[slot_id].node
            token = tree.tokens[child]
            ratio = float(law[token]) / (scale * float(q[token]))
            examined.append((slot_id, min(1.0, ratio)))
            possible = child if ratio > 0 else possible
            if coin(ratio, rng):
                accepted = child
                break
        if accepted is None:
            residual = _kseq_residual(law, q, k, scale)
            if residual.sum() >= UNDERFLOW:
                return Verdict(tree.path(node), draw(residual, rng), examined)
            if possible is None:
                break
            accepted = possible  # rejecting all of them was impossible
        node = accepted
    return Verdict(tree.path(node), draw(p[node], rng), examined)


def _shared(tree: TokenTree, node: int) -> tuple[Floats, int]:
    """The law of all slots of a node, and their number."""
    siblings = tree.slots_of[node]
    law = tree.slots[siblings[0]].law
    assert law is not None
    return law.rows[law.row], len(siblings)


def _scale(p: Floats, q: Floats, k: int) -> float:
    """The smallest ρ in [1, k] with _chances(β, k) ≤ ρ.

    The paper's ρ is where they are equal; above it nothing is negative, so the upper end of a
    bracket is exact however wide it is. Bisected to the precision of float32.
    """
    low, high = 1.0, float(k)
    if _chances(_overlap(p, q, low), k) <= low:
        return low
    while high - low > 2**-23 * high:
        middle = (low + high) / 2
        if _chances(_overlap(p, q, middle), k) <= middle:
            high = middle
        else:
            low = middle
    return high


def _overlap(p: Floats, q: Floats, scale: float) -> float:
    """β = Σ min(p / ρ, q), the chance that one slot is accepted."""
    return float(np.minimum(p / scale, q).sum())


def _chances(overlap: float, k: int) -> float:
    """(1 - (1 - β)^k) / β, the mean number of slots looked at."""
    if overlap <= 0.0:
        return float(k)
    if overlap >= 1.0:
        return 1.0
    return -math.expm1(k * math.log1p(-overlap)) / overlap


def _kseq_residual(p: Floats, q: Floats, k: int, scale: float) -> Floats:
    """p less what was emitted by accepting: min(p / ρ, q) each time a slot is looked at."""
    looked_at = _chances(_overlap(p, q, scale), k)
    residual: Floats = np.maximum(p - np.minimum(p / scale, q) * looked_at, 0.0)
    return residual


def verify_gbv(tree: TokenTree, p: Floats, rng: np.random.Generator) -> Verdict:
    """Follow the best-ranked slot of each node; accept a part of that path by blocks.

    p       [nodes, vocab] float32, rows sum to 1: the target's law after each node
    raises  LawError unless each node's slots were drawn independently from one law
    law     P(tokens) = p, to the rounding of the laws: the best of k independent slots has a law
            of its own, and along one path traversal is block verification
    source  greedy multi-path block verification (Thomas & Pal 2026, arXiv 2602.16961). K paths are
            a tree in which a node has as many slots as paths lead to it
    cost    one sort of the vocabulary per node of that path, then `verify_traversal` on it
    """
    require_lawful(tree, "gbv", p.shape[-1])
    chain = TokenTree(tree.tokens[0])
    nodes, slot_ids = [0], []
    while siblings := tree.slots_of[nodes[-1]]:
        q, k = _shared(tree, nodes[-1])
        order = _order(p[nodes[-1]], q)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        tokens = [tree.tokens[tree.slots[slot_id].node] for slot_id in siblings]
        best = int(place[tokens].argmin())
        law = Law(_law_of_best(q, k, order)[None], 0)
        chain.add(len(nodes) - 1, tokens[best], law=law)
        slot_ids.append(siblings[best])
        nodes.append(tree.slots[siblings[best]].node)
    verdict = verify_traversal(chain, p[nodes], rng)
    return Verdict(
        [nodes[node] for node in verdict.path],
        verdict.next_token,
        [(slot_ids[slot], ratio) for slot, ratio in verdict.examined],
    )


def _order(p: Floats, q: Floats) -> npt.NDArray[np.intp]:
    """Tokens by p / q, best first, the lowest id first among equals.

    Strict: were equals one rank, the best slot's law would depend on which of them came first.
    """
    ratio = np.divide(p, q, out=np.zeros_like(p), where=q > 0)
    return np.argsort(-ratio, kind="stable")


def _law_of_best(q: Floats, k: int, order: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """π of the best of k tokens drawn from q: F(x)^k - F(x-)^k.

    F is the mass of the tokens ranked no better; the difference is F^k · (1 - (1 - q/F)^k), which
    does not cancel.
    """
    mass = q[order].astype(np.float64)
    below = mass[::-1].cumsum()[::-1]
    share = np.divide(mass, below, out=np.zeros_like(mass), where=below > 0)
    with np.errstate(divide="ignore"):  # log 0 at the last token: expm1(-inf) = -1
        fails = np.expm1(k * np.log1p(-share))
    law = np.empty_like(mass)
    law[order] = (below / below[0]) ** k * -fails
    return law
