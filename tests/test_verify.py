"""The law of verification, by enumeration: exact where it must be, and the oracle is not blind."""

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer import baselines, sampling, verify
from specinfer.baselines import verify_gbv, verify_kseq
from specinfer.errors import LawError
from specinfer.logits import RowFilters, target_laws
from specinfer.request import SamplingParams
from specinfer.tree import PICK, Law, TokenTree, union
from specinfer.verify import (
    follow,
    require_lawful,
    verify_match,
    verify_topdown,
    verify_traversal,
)
from tests.helpers import children, top_k_tokens
from tests.oracle import (
    ALMOST_ONE,
    DRAWS,
    KINDS,
    Toy,
    Uniform,
    context,
    enumerate_chance,
    fixed,
    measure,
    merged,
    mutant,
    outcomes,
    paths,
    target_rows,
    toys,
    verify_greedy,
)

EXACT = 1e-9
SHIFTED = 1e-3
SAMPLING_VERIFIERS = (verify_match, verify_topdown, verify_traversal)
LAW_VERIFIERS = (verify_topdown, verify_traversal)
Q = np.array([[0.5, 0.5, 0.0]], np.float32)


@pytest.fixture(autouse=True)
def _chance_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    enumerate_chance(monkeypatch)


def assert_exact(target: Toy, grow: Any, verifier: Any, length: int) -> None:
    outcome = measure(target, grow, verifier, length)
    assert abs(outcome.mass - 1) < EXACT
    assert outcome.deviation < EXACT


# --- exact: every way to draw, every shape, every verifier ----------------------------------------

SHAPES = [(2,), (3,), (1, 2), (2, 1), (3, 1)]
BIG_SHAPES = [(2, 2), (2, 1, 1)]


@pytest.mark.parametrize("verifier", SAMPLING_VERIFIERS)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_drafter_is_exact(kind: str, draw: str, verifier: Any) -> None:
    for seed, widths in enumerate(SHAPES):
        target, drafter, _ = toys(kind, 10 * seed, vocab=3)
        assert_exact(target, fixed(drafter, widths, draw), verifier, len(widths) + 1)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("widths", BIG_SHAPES)
@pytest.mark.parametrize("draw", DRAWS)
def test_bigger_shapes_are_exact(draw: str, widths: tuple[int, ...], verifier: Any) -> None:
    for seed, kind in enumerate(("dense", "zeros")):
        target, drafter, _ = toys(kind, seed, vocab=3)
        assert_exact(target, fixed(drafter, widths, draw), verifier, len(widths) + 1)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("draw", ["iid", "without-replacement"])
def test_a_vocabulary_of_four_is_exact(draw: str, verifier: Any) -> None:
    for seed, kind in enumerate(KINDS):
        target, drafter, _ = toys(kind, seed, vocab=4)
        assert_exact(target, fixed(drafter, (2, 1), draw), verifier, 3)


@pytest.mark.parametrize("verifier", SAMPLING_VERIFIERS)
@pytest.mark.parametrize(
    "draws", [("iid", "iid"), ("without-replacement",) * 2, ("pick", "iid"), ("iid", "pick")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_two_drafters_are_exact(kind: str, draws: tuple[str, str], verifier: Any) -> None:
    for seed, (one, two) in enumerate([((2,), (1,)), ((1, 1), (1, 1)), ((2,), (1, 1))]):
        target, first, second = toys(kind, seed, vocab=3)
        grow = merged(fixed(first, one, draws[0]), fixed(second, two, draws[1], source=1))
        assert_exact(target, grow, verifier, 3)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_two_branching_drafters_are_exact(verifier: Any) -> None:
    target, first, second = toys("zeros", 5, vocab=3)
    grow = merged(fixed(first, (2, 1), "without-replacement"), fixed(second, (2,), "iid", source=1))
    assert_exact(target, grow, verifier, 3)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_drafters_on_one_tree_are_exact(kind: str, verifier: Any) -> None:
    """The second draws from what the first has left unseen."""
    target, first, second = toys(kind, 3, vocab=3)

    def in_turn(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
        for source, law in enumerate((q, second.law(context(tree, node)))):
            seen = tuple(tree.tokens[child] for child in children(tree, node))
            sampling.add_without_replacement(
                tree, node, law[None], 0, k, rng, source=source, seen=seen
            )

    assert_exact(target, fixed(first, (1, 1), in_turn), verifier, 3)
    assert_exact(target, fixed(first, (2,), in_turn), verifier, 2)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_other_tokens_is_exact(kind: str, verifier: Any) -> None:
    """A budget may be shared: whether a slot exists may depend on q, on its ancestors, on earlier
    siblings and what hangs below them, and on tokens elsewhere; not on its own token."""

    def grow(rng: Any) -> TokenTree:
        tree = TokenTree(0)
        root = drafter.law(())
        if root.max() < 0.4:  # too unsure: stop before drawing
            return tree
        one, two = (sampling.add_iid(tree, 0, root[None], 0, 1, rng)[0] for _ in range(2))
        if root[tree.tokens[two]] > 0.3:  # below the first, by the second's token
            q = drafter.law(context(tree, one))
            (below,) = sampling.add_iid(tree, one, q[None], 0, 1, rng)
            if q[tree.tokens[below]] > 0.3:  # beside the first, by what hangs below it
                sampling.add_iid(tree, 0, root[None], 0, 1, rng)
        return tree

    for seed in range(3):
        target, drafter, _ = toys(kind, 10 * seed, vocab=3)
        assert_exact(target, grow, verifier, 3)


def test_greedy_emits_the_greedy_text() -> None:
    for kind in KINDS:
        target, drafter, _ = toys(kind, 3, vocab=3)
        greedy = Toy(0, 3, lambda rng: None)
        greedy.law = lambda text, t=target: np.eye(3)[t.law(text).argmax()]  # type: ignore[method-assign]
        for draw in DRAWS:
            grow = fixed(drafter, (2, 1), draw)
            for rows in (target, greedy):

                def verifier(tree: TokenTree, p: Any, rng: Any, rows: Toy = rows) -> Any:
                    return verify_greedy(tree, target_rows(rows, tree))

                assert_exact(greedy, grow, verifier, 3)


def test_match_needs_no_laws() -> None:
    def unrecorded(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
        for token in sampling.draw_without_replacement(q, k, rng):
            tree.add(node, token, law=None)

    target, drafter, _ = toys("dense", 0, vocab=3)
    assert_exact(target, fixed(drafter, (2, 2), unrecorded), verify_match, 3)


# --- broken rules must show -----------------------------------------------------------------------


def shows(draw: Any, verifier: Any, widths: tuple[int, ...] = (2,), kind: str = "dense") -> bool:
    """Whether the law of one of a few models is shifted."""
    for seed in range(6):
        target, drafter, _ = toys(kind, 10 * seed, vocab=4)
        outcome = measure(target, fixed(drafter, widths, draw), verifier, len(widths) + 1)
        assert abs(outcome.mass - 1) < 0.1
        if outcome.deviation > SHIFTED:
            return True
    return False


def prune_by_own_q(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    for token in (sampling.draw(q, rng) for _ in range(k)):
        if q[token] > 0.3:
            tree.add(node, token, law=Law(q[None], 0))


def top_k_as_if_sampled(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    tokens = top_k_tokens(q, k)
    for order, token in enumerate(tokens):
        tree.add(node, token, law=Law(q[None], 0, tuple(tokens[:order])))


def siblings_sorted_by_q(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    for token in sorted((sampling.draw(q, rng) for _ in range(k)), key=lambda token: -q[token]):
        tree.add(node, token, law=Law(q[None], 0))


def siblings_sorted_by_token(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    for token in sorted(sampling.draw(q, rng) for _ in range(k)):
        tree.add(node, token, law=Law(q[None], 0))


def repeats_dropped(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    for token in dict.fromkeys(sampling.draw(q, rng) for _ in range(k)):
        tree.add(node, token, law=Law(q[None], 0))


def full_q_recorded(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    for token in sampling.draw_without_replacement(q, k, rng):
        tree.add(node, token, law=Law(q[None], 0))


def size_by_looking(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    tokens = [sampling.draw(q, rng) for _ in range(k)]
    size = k if sum(q[token] for token in tokens) > k / 3 else 1
    for token in tokens[:size]:
        tree.add(node, token, law=Law(q[None], 0))


def pick_by_a_later_sibling(tree: TokenTree, node: int, q: Any, k: int, rng: Any) -> None:
    drawn = sampling.draw(q, rng)
    tree.add(node, (drawn + 1) % len(q), law=PICK)
    tree.add(node, drawn, law=Law(q[None], 0))


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize(
    "draw",
    [
        prune_by_own_q,
        top_k_as_if_sampled,
        siblings_sorted_by_q,
        siblings_sorted_by_token,
        repeats_dropped,
        full_q_recorded,
        size_by_looking,
        pick_by_a_later_sibling,
    ],
)
def test_a_law_that_is_not_the_one_drawn_from_shows(draw: Any, verifier: Any) -> None:
    widths = (3,) if draw is repeats_dropped else (2,)
    assert shows(draw, verifier, widths)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_dropping_the_second_drafters_repeat_shows(verifier: Any) -> None:
    def merge_dropping(grows: tuple[Any, Any]) -> Any:
        def grow(rng: Any) -> TokenTree:
            tree, _ = union([grow(rng) for grow in grows], rng)
            thinned = TokenTree(tree.tokens[0])
            for slot in tree.slots:
                if thinned.child(slot.parent, tree.tokens[slot.node]) is None:
                    thinned.add(slot.parent, tree.tokens[slot.node], law=slot.law)
            return thinned

        return grow

    shifts = []
    for seed in range(6):
        target, first, second = toys("dense", seed, vocab=3)
        grows = (fixed(first, (2,), "without-replacement"), fixed(second, (2,), "iid", source=1))
        assert_exact(target, merged(*grows), verifier, 2)
        shifts.append(measure(target, merge_dropping(grows), verifier, 2).deviation)
    assert max(shifts) > SHIFTED


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("verify_topdown", "not residual.subtract(1.0, token, row, left)", "False"),
        ("verify_traversal", "residual.subtract(w, token, row, left)", "w"),
        ("verify_traversal", "w = rest / (rest + (1.0 - w))", "pass"),
        ("verify_traversal", "min(1.0, w * ratio)", "min(1.0, ratio)"),
        (
            "verify_traversal",
            "elif w < 1.0:\n                residual.release()\n                return None",
            "elif w < 0:\n                pass",
        ),
    ],
)
def test_a_broken_rule_shows(name: str, old: str, new: str) -> None:
    verifier = mutant(name, old, new, verify)
    kinds = ("dense", "zeros", "disjoint", "equal")
    assert any(shows("without-replacement", verifier, (1, 2), kind) for kind in kinds)


# --- baselines: exact on what they take, or refused -----------------------------------------------

BASELINES = (verify_kseq, verify_gbv)


@pytest.mark.parametrize("verifier", BASELINES)
@pytest.mark.parametrize("widths", [(1,), (2,), (4,), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_exact(kind: str, widths: tuple[int, ...], verifier: Any) -> None:
    for seed in range(2):
        target, drafter, _ = toys(kind, 10 * seed, vocab=3)
        assert_exact(target, fixed(drafter, widths, "iid"), verifier, len(widths) + 1)


@pytest.mark.parametrize("verifier", [*LAW_VERIFIERS, *BASELINES])
@pytest.mark.parametrize("kind", KINDS)
def test_independent_paths_are_exact(kind: str, verifier: Any) -> None:
    target, drafter, _ = toys(kind, 20, vocab=3)
    assert_exact(target, paths(drafter, 2, 2), verifier, 3)


@pytest.mark.parametrize("verifier", BASELINES)
@pytest.mark.parametrize(("count", "depth"), [(3, 2), (2, 3)])
def test_more_and_longer_paths_are_exact(count: int, depth: int, verifier: Any) -> None:
    target, drafter, _ = toys("ties", 30, vocab=2)
    assert_exact(target, paths(drafter, count, depth), verifier, depth + 1)
    target, drafter, _ = toys("dense", 30, vocab=2)
    assert_exact(target, paths(drafter, count, depth), verifier, depth + 1)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("verify_kseq", "/ (scale * float(q[token]))", "/ float(q[token])"),
        ("verify_kseq", "np.minimum(p / scale, q) * looked_at", "np.minimum(p, q)"),
        ("verify_kseq", "return float(k)\n    if overlap >= 1.0", "return 1.0\n    if overlap < 2"),
        ("verify_gbv", "_law_of_best(q, k, order)[None]", "q[None]"),
        (  # equals as one rank: the first of them drawn is taken for the best
            "verify_gbv",
            "place[order] = np.arange(len(order))",
            "place = np.unique(np.where(q > 0, -p[nodes[-1]] / q, 0), return_inverse=True)[1]",
        ),
        (  # the number of slots is the root's at every node
            "verify_gbv",
            "q, k = _shared(tree, nodes[-1])",
            "q, k = _shared(tree, nodes[-1])[0], len(tree.slots_of[0])",
        ),
    ],
)
def test_a_broken_baseline_shows(name: str, old: str, new: str) -> None:
    verifier = mutant(name, old, new, baselines)
    for kind, seed in itertools.product(("dense", "ties"), range(3)):
        target, drafter, _ = toys(kind, 10 * seed, vocab=3)
        if measure(target, paths(drafter, 2, 2), verifier, 3).deviation > SHIFTED:
            return
    pytest.fail("no model shows it")


@pytest.mark.parametrize("name", ["kseq", "gbv"])
@pytest.mark.parametrize(
    ("laws", "words"),
    [
        ([(0, PICK)], "was picked"),
        ([(0, Law(Q, 0)), (1, Law(Q, 0, (0,)))], "without replacement"),
        ([(0, Law(Q, 0)), (1, Law(Q.copy(), 0))], "another law"),
        ([(0, Law(Q, 0)), (1, PICK)], "was picked"),
        ([(0, None)], "has none"),
    ],
)
def test_baselines_refuse_what_is_not_independent(
    name: str, laws: list[tuple[int, Law | None]], words: str
) -> None:
    tree = TokenTree(0)
    for token, law in laws:
        tree.add(0, token, law=law)
    p = np.full((len(tree), 3), 1 / 3, np.float32)
    for verifier in BASELINES:
        with pytest.raises(LawError, match=words):
            verifier(tree, p, np.random.default_rng(0))
    with pytest.raises(LawError, match=f"{name} needs"):
        require_lawful(tree, name, 3)


# --- identities -----------------------------------------------------------------------------------


def block_verification(p: Any, q: list[Any], tokens: list[int]) -> list[float]:
    """P(exactly i drafted tokens are accepted), i = 0..n, on a chain.

    Sun et al., "Block Verification Accelerates Speculative Decoding", algorithm 2, written from
    the paper: p_i = min(1, p_{i-1} · M_b(x_i) / M_s(x_i)); h_i = S_i / (S_i + 1 - p_i) with
    S_i = Σ max(0, p_i · M_b - M_s), h_n = p_n; the last i with η_i ≤ h_i is accepted.
    """
    share, accept = 1.0, [1.0]
    for i, token in enumerate(tokens):
        share = min(1.0, share * p[i][token] / q[i][token])
        if i + 1 < len(tokens):
            mass = np.maximum(0, share * p[i + 1] - q[i + 1]).sum()
            accept.append(mass / (mass + 1 - share) if mass + 1 - share > 0 else 1.0)
        else:
            accept.append(share)
    exactly, later_fail = [], 1.0
    for h in reversed(accept):
        exactly.append(later_fail * h)
        later_fail *= 1 - h
    return exactly[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_chain_traversal_is_block_verification(kind: str) -> None:
    for seed in range(3):
        target, drafter, _ = toys(kind, seed, vocab=3)
        for _, tree in outcomes(fixed(drafter, (1, 1, 1), "iid")):
            p = target_rows(target, tree)
            q = [drafter.law(tuple(tree.tokens[1 : 1 + depth])) for depth in range(3)]
            got = [0.0] * 4
            for probability, verdict in outcomes(
                lambda rng, p=p, tree=tree: verify_traversal(tree, p, rng)
            ):
                got[len(verdict.path)] += probability
            assert got == pytest.approx(block_verification(p, q, tree.tokens[1:]), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(2, 2), (3, 1), (1, 2)])
def test_on_picks_all_rules_are_one(kind: str, widths: tuple[int, ...]) -> None:
    target, first, second = toys(kind, 7, vocab=3)
    grow = merged(fixed(first, widths, "pick"), fixed(second, (1, 1), "pick", source=1))
    for _, tree in outcomes(grow):
        p = target_rows(target, tree)
        laws = []
        for verifier in SAMPLING_VERIFIERS:
            law: dict[Any, float] = defaultdict(float)
            for probability, verdict in outcomes(
                lambda rng, verifier=verifier, p=p, tree=tree: verifier(tree, p, rng)
            ):
                law[*verdict.path, -1, verdict.next_token] += probability
            laws.append(law)
        for law in laws[1:]:
            for key in law | laws[0]:
                assert law[key] == pytest.approx(laws[0][key], abs=1e-12)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_cold_target_is_greedy(draw: str) -> None:
    target, drafter, _ = toys("dense", 1, vocab=3)
    for _, tree in outcomes(fixed(drafter, (2, 1), draw)):
        logits = torch.from_numpy(np.log(target_rows(target, tree)))
        greedy = verify_greedy(tree, logits.numpy())
        filters = RowFilters.of([(SamplingParams(temperature=1e-5), len(tree))])
        p = target_laws(logits, filters).numpy()
        for verifier in SAMPLING_VERIFIERS:
            ((_, verdict),) = outcomes(
                lambda rng, verifier=verifier, p=p, tree=tree: verifier(tree, p, rng)
            )
            assert (verdict.path, verdict.next_token) == (greedy.path, greedy.next_token)


@pytest.mark.parametrize("draw", ["iid", "without-replacement"])
@pytest.mark.parametrize("widths", [(2, 1), (1, 2), (1, 1, 1)])
def test_traversal_never_accepts_less_than_topdown(draw: str, widths: tuple[int, ...]) -> None:
    for seed, kind in enumerate(KINDS):
        target, drafter, _ = toys(kind, seed, vocab=3)
        grow = fixed(drafter, widths, draw)
        topdown, traversal = (
            measure(target, grow, verifier, len(widths) + 1).accepted for verifier in LAW_VERIFIERS
        )
        assert traversal > topdown - EXACT


@pytest.mark.parametrize("draw", DRAWS)
def test_examined_forecasts_topdowns_acceptance(draw: str) -> None:
    target, drafter, _ = toys("zeros", 4, vocab=3)
    outcome = measure(target, fixed(drafter, (2, 1), draw), verify_topdown, 3)
    assert outcome.forecast == pytest.approx(outcome.accepted, abs=EXACT)


# --- follow, lawfulness, float32 ------------------------------------------------------------------


def small_tree() -> TokenTree:
    tree = TokenTree(9)
    tree.add(0, 1)
    tree.add(0, 2)
    tree.add(0, 1, source=1)
    tree.add(2, 3)
    return tree


def test_follow_goes_as_far_as_the_picks_are_drafted() -> None:
    verdict = follow(small_tree(), [2, 0, 3, 5])
    assert (verdict.path, verdict.next_token) == ([2, 3], 5)
    assert verdict.examined == [(0, 0.0), (1, 1.0), (3, 1.0)]
    verdict = follow(small_tree(), np.array([7, 0, 0, 0]))
    assert (verdict.path, verdict.next_token) == ([], 7)
    assert verdict.examined == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert follow(TokenTree(9), [4]).next_token == 4


@pytest.mark.parametrize(
    ("laws", "words"),
    [
        ([(0, None)], "has none"),
        ([(2, Law(Q, 0))], "cannot draw"),
        ([(0, Law(Q, 0)), (0, Law(Q, 0, (0,)))], "cannot draw"),
        ([(0, Law(Q[:, :2], 0))], "over 2 tokens"),
        ([(5, PICK)], "token 5"),
        ([(0, Law(Q, 0, (1,))), (1, Law(Q, 0))], "no earlier sibling"),
    ],
)
def test_unlawful_trees_are_refused(laws: list[tuple[int, Law | None]], words: str) -> None:
    tree = TokenTree(0)
    for token, law in laws:
        tree.add(0, token, law=law)
    p = np.full((len(tree), 3), 1 / 3, np.float32)
    for verifier in LAW_VERIFIERS:
        with pytest.raises(LawError, match=words):
            verifier(tree, p, np.random.default_rng(0))
    require_lawful(tree, "match", 3)
    require_lawful(tree, "greedy", 3)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([2, 5, 700]),
    closeness=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
    sharpness=st.sampled_from([0.1, 5.0, 60.0]),
    draw=st.sampled_from(DRAWS),
)
def test_float32_laws_hold_up(
    seed: int, vocab: int, closeness: float, sharpness: float, draw: str
) -> None:
    """Nearly equal, nearly one-hot and exactly equal laws: a verdict, and no impossible token."""
    rng = np.random.default_rng(seed)
    logits: dict[Any, Any] = defaultdict(lambda: rng.normal(size=vocab) * sharpness)

    def rounded(text: Any, shift: float) -> Any:
        noise = np.random.default_rng([seed, *text]).normal(size=vocab) * shift
        scores = torch.from_numpy(logits[text] + noise).float()
        return torch.softmax(scores.masked_fill(scores < scores.max() - 20, -torch.inf), -1).numpy()

    target, drafter = (Toy(0, vocab, lambda rng: None) for _ in range(2))
    target.law = lambda text: rounded(text, 0.0)  # type: ignore[method-assign]
    drafter.law = lambda text: rounded(text, closeness)  # type: ignore[method-assign]
    tree = fixed(drafter, (2, 3, 1), draw)(rng)
    p = target_rows(target, tree)
    assert p.dtype == np.float32
    verifiers = (*SAMPLING_VERIFIERS, *(BASELINES if draw == "iid" else ()))
    for verifier, chance in itertools.product(verifiers, (rng, Uniform(ALMOST_ONE))):
        verdict = verifier(tree, p, chance)  # type: ignore[operator]
        nodes = [0, *verdict.path]
        assert [tree.parents[node] for node in nodes[1:]] == nodes[:-1]
        emitted = [*(tree.tokens[node] for node in nodes[1:]), verdict.next_token]
        assert all(p[node, token] > 0 for node, token in zip(nodes, emitted, strict=True))


def test_a_drafter_equal_to_the_target_is_always_accepted() -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([0.1] * 300, size=8).astype(np.float32)
    for _ in range(50):
        tree = TokenTree(0)
        for depth in range(7):
            sampling.add_iid(tree, depth, rows, depth, 1, rng)
        for verifier in LAW_VERIFIERS:
            assert len(verifier(tree, rows, rng).path) == 7


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_an_impossible_rejection_accepts(verifier: Any) -> None:
    p = np.array([[0.5, 0.5], [1.0, 0.0]])
    q = p[:1] + np.array(
        [1e-14, -1e-14]
    )  # M[0] / π[0] is just below 1, and nothing is left of M - π
    tree = TokenTree(0)
    tree.add(0, 0, law=Law(q, 0))
    assert verifier(tree, p, Uniform(ALMOST_ONE)).path == [1]


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_rounding_never_accepts_an_impossible_token(verifier: Any) -> None:
    p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = p[:1] + np.array(
        [0.0, -1e-14, 1e-14]
    )  # the drafter draws token 2, which the target never emits
    tree = TokenTree(0)
    tree.add(0, 2, law=Law(q, 0))
    verdict = verifier(tree, p, Uniform(ALMOST_ONE))
    assert (verdict.path, verdict.next_token) == ([], 1)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_picks_that_use_up_a_float32_law_accept_the_last(verifier: Any) -> None:
    p = np.array([[0.6, 0.39999995, 0.0]] * 3, np.float32)  # sums to a little less than 1
    tree = TokenTree(0)
    tree.add(0, 0)
    tree.add(0, 1)
    verdict = verifier(tree, p, Uniform(ALMOST_ONE))
    assert verdict.path[:1] == [2]


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_a_picks_small_remainder_is_summed_anew(verifier: Any) -> None:
    p = np.array([[0.9999999, 3e-8, 1e-8]] * 3, np.float32)  # 1 - M[0] would be all rounding
    tree = TokenTree(0)
    tree.add(0, 0)
    tree.add(0, 1)
    examined = verifier(tree, p, Uniform(ALMOST_ONE)).examined
    assert examined[1] == (1, pytest.approx(0.75))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    concentration=st.sampled_from([0.02, 1.0]),
    draw=st.sampled_from(DRAWS),
    single=st.booleans(),
)
def test_a_residual_is_the_formula(
    seed: int, concentration: float, draw: str, single: bool
) -> None:
    """The few passes over float32 against M = normalise(max(0, w·M - π)), written out in float64.

    A law's rounding of 1e-7 is multiplied where little is left of M or of π.
    """
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet([concentration] * 70, 2)
    toy = Toy(0, 70, lambda rng: None)
    toy.law = lambda text: q.astype(np.float32) if single else q  # type: ignore[method-assign]
    tree = fixed(toy, (6,), draw)(rng)
    residual = verify._Residual(p.astype(np.float32) if single else p, [])
    M, w = p, 1.0
    for slot_id, slot in enumerate(tree.slots):
        token, law = tree.tokens[slot.node], slot.law
        assert law is not None
        dense = np.eye(70)[token] if law.is_pick else law.dense().astype(np.float64)
        if w * M[token] >= dense[token]:
            return  # it is never rejected
        R = np.maximum(0, w * M - dense)
        if R.sum() < 1e-2:
            return
        kept = residual.subtract(w, *verify._open(tree, slot_id)[1:])
        M, w = R / R.sum(), R.sum() / (R.sum() + 1 - w)
        error = 1e-4 if single else 1e-12
        assert kept == pytest.approx(R.sum(), rel=error)
        weights = residual._dense() / residual.mass
        assert np.abs(weights - M).sum() < error
        for other in range(70):
            assert residual.ratio(other, None, 1.0) == pytest.approx(M[other], abs=error)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_a_law_with_next_to_nothing_left_is_written_out(verifier: Any) -> None:
    q = np.array([[1.0, 3e-38, 1e-38, 0.0, 0.0]], np.float32)
    p = np.array([[0.1, 0.3, 0.2, 0.4, 0.0]] * 4, np.float32)
    tree = TokenTree(0)
    for order, token in enumerate((0, 1, 2)):
        tree.add(0, token, law=Law(q, 0, (0, 1)[:order]))
    verdict = verifier(tree, p, Uniform(ALMOST_ONE))
    assert (verdict.path, verdict.next_token) == ([], 3)
    ratios = [ratio for _, ratio in verdict.examined]
    # M = (0, 1/3, 2/9, 4/9), π = (0, 3/4, 1/4); then M = (0, 0, 0, 1), π = (0, 0, 1)
    assert ratios == pytest.approx([0.1, 4 / 9, 0.0], rel=1e-5)
