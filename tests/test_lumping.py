"""Verification far away: over the tokens that could have been drawn, all others as one.

By enumeration: what it decides is, tree by tree, what the verifiers decide on whole laws; trees of
laws cut to a few tokens are exact with every builder, verifier and mix; broken rules show.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specinfer import lumping
from specinfer.draft import growth
from specinfer.draft.growth import Drawable
from specinfer.engine import verification
from specinfer.engine.verification import Case
from specinfer.errors import LawError
from specinfer.lumping import Lumped
from specinfer.ops.transfer import to_host
from specinfer.sampling import add_without_replacement, request_generator
from specinfer.tree import PICK, Law, Slot, TokenTree
from specinfer.verify import verify_match, verify_topdown, verify_traversal
from tests import test_builders as builders
from tests.engines import far_away
from tests.oracle import (
    DRAWS,
    KINDS,
    Toy,
    context,
    emission,
    enumerate_chance,
    exact_laws,
    far,
    fixed,
    measure_drafted,
    merged,
    mutant,
    outcomes,
    paths,
    target_rows,
    toys,
    verify_all,
)

EXACT = 1e-9
SHIFTED = 1e-3
VERIFIERS = (verify_match, *builders.LAW_VERIFIERS)


@pytest.fixture(autouse=True)
def _chance_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    enumerate_chance(monkeypatch)
    exact_laws(monkeypatch)


# --- tree by tree what the verifiers decide -------------------------------------------------------


def emitted(verifier: Any, tree: TokenTree, p: Any) -> dict[Any, float]:
    """The law of what is committed, of the path and of the slots looked at with their ratios."""
    law: dict[Any, float] = defaultdict(float)
    for chance, verdict in outcomes(lambda rng: verifier(tree, p, rng)):
        looked = [(slot, round(ratio, 9)) for slot, ratio in verdict.examined]
        law[emission(tree, verdict), tuple(verdict.path), tuple(looked)] += chance
    return law


def assert_same(verifier: Any, drafted: Sequence[tuple[float, TokenTree]], target: Any) -> None:
    for _, tree in drafted:
        p = target_rows(target, tree)
        near, away = (emitted(each, tree, p) for each in (verifier, far(verifier)))
        for key in near | away:
            assert away[key] == pytest.approx(near[key], abs=1e-12)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_far_verdict_has_the_law_of_a_near_one(draw: str, verifier: Any) -> None:
    """Laws have zeros, so that there are others: of the drafter's, of the target's, of both."""
    for seed, kind in enumerate(("zeros", "one-hot target", "one-hot drafter", "disjoint")):
        target, first, second = toys(kind, seed, vocab=4)
        drafted = list(outcomes(fixed(first, (2, 1), draw)))
        assert_same(verifier, drafted[:20], target)
        both = merged(fixed(first, (1, 1), draw), fixed(second, (1,), "iid", source=1))
        assert_same(verifier, list(outcomes(both))[:20], target)


@pytest.mark.parametrize("verifier", builders.BASELINES)
def test_far_baselines_have_the_law_of_near_ones(verifier: Any) -> None:
    for seed, kind in enumerate(KINDS):
        target, drafter, _ = toys(kind, seed, vocab=4)
        for grow in (fixed(drafter, (3,), "iid"), paths(drafter, 2, 2)):
            assert_same(verifier, list(outcomes(grow))[:20], target)


# --- trees from cut laws --------------------------------------------------------------------------


@pytest.mark.parametrize("mix", builders.MIXES)
@pytest.mark.parametrize("builder", builders.BUILDERS)
def test_every_builder_is_exact_with_cut_laws(
    monkeypatch: pytest.MonkeyPatch, builder: str, mix: str
) -> None:
    """Two tokens of four are left of each law, and not the same ones of two models'."""
    far_away(monkeypatch, support=2)
    seed = builders.BUILDERS.index(builder) + 3 * builders.MIXES.index(mix)
    target, drafters = builders.sources(mix, KINDS[seed % len(KINDS)], seed, vocab=4)
    make, request = builders.builders(seed, len(drafters))[builder]
    request.max_nodes = min(request.max_nodes, 4 if request.draw == "pick" else 16)
    request.max_depth = 2
    drafted = builders.drafted_by(make, drafters, request)
    for verifier in VERIFIERS:
        assert_exact(target, drafted, far(verifier))


@pytest.mark.parametrize("verifier", builders.BASELINES)
def test_baselines_are_exact_with_cut_laws(monkeypatch: pytest.MonkeyPatch, verifier: Any) -> None:
    far_away(monkeypatch, support=2)
    for seed, kind in enumerate(KINDS):
        target, drafters = builders.sources("one model", kind, seed, vocab=4)
        for make in (builders.shape(2, 1), builders.paths(2, 2)):
            drafted = builders.drafted_by(make, drafters, builders.Request("iid", 16))
            assert_exact(target, drafted, far(verifier))


def assert_exact(target: Any, drafted: Any, verifier: Any) -> None:
    outcome = measure_drafted(target, drafted, verifier, 3)
    assert abs(outcome.mass - 1) < EXACT
    assert outcome.deviation < EXACT


def test_two_requests_share_the_work_and_nothing_else() -> None:
    """Their verdicts' joint law is the product of their own; one is lawless alone."""
    target, first, second = toys("zeros", 3, vocab=4)
    trees = [
        next(tree for _, tree in outcomes(fixed(toy, (2,), "without-replacement")))
        for toy in (first, second)
    ]
    rows = [target_rows(target, tree) for tree in trees]
    p = torch.from_numpy(np.concatenate(rows))

    def both(rng: Any) -> list[Any]:
        return verify_all([Case(tree, verify_traversal, rng) for tree in trees], p)

    joint: dict[Any, float] = defaultdict(float)
    for chance, verdicts in outcomes(both):
        joint[tuple(emission(*pair) for pair in zip(trees, verdicts, strict=True))] += chance
    alone: list[dict[Any, float]] = [defaultdict(float), defaultdict(float)]
    for law, tree, own in zip(alone, trees, rows, strict=True):
        for (tokens, _, _), chance in emitted(verify_traversal, tree, own).items():
            law[tokens] += chance
    for one, share in alone[0].items():
        for two, other in alone[1].items():
            assert joint[one, two] == pytest.approx(share * other, abs=1e-12)
    p[len(trees[0])] = torch.nan
    rngs = [request_generator(0, number) for number in range(2)]
    cases = [Case(tree, verify_topdown, rng) for tree, rng in zip(trees, rngs, strict=True)]
    kept, lost = verify_all(cases, p)
    assert kept is not None
    assert lost is None
    cases = [case._replace(verifier=verify_match) for case in cases]
    assert [verdict is None for verdict in verify_all(cases, p)] == [False, True]


# --- broken rules must show -----------------------------------------------------------------------

Look = Callable[[TokenTree, Any], TokenTree]


def shifts(
    verifier: Any, look: Look = lambda tree, toy: tree, verify: Any = None
) -> Iterator[float]:
    """How far the law is shifted, for a few models, mixes and builders."""
    for seed in range(4):
        for mix, builder in (("one model", "best-first"), ("n-gram first", "shape")):
            target, drafters = builders.sources(mix, "dense", seed, vocab=4)
            make, request = builders.builders(seed, len(drafters))[builder]
            drafted = [
                (chance, look(tree, drafters[-1].toy))
                for chance, tree in builders.drafted_by(make, drafters, request)
            ]
            yield measure_drafted(target, drafted, far(verifier, verify), 3).deviation


def shows(shifts: Iterable[float]) -> bool:
    """Whether one is seen; those behind it are not asked for."""
    return any(shift > SHIFTED for shift in shifts)


def relawed(tree: TokenTree, relaw: Callable[[Slot, int], Law]) -> TokenTree:
    """The same tree with other laws for the slots that were drawn."""
    new = TokenTree(tree.tokens[0])
    for slot in tree.slots:
        token, law = tree.tokens[slot.node], slot.law
        if law is not PICK:
            law = relaw(slot, token)
        new.add(slot.parent, token, source=slot.source, law=law)
    return new


def whole_law_recorded(tree: TokenTree, toy: Toy) -> TokenTree:
    def whole(slot: Slot, token: int) -> Law:
        assert slot.law is not None
        return Law(toy.law(context(tree, slot.parent))[None], 0, slot.law.seen)

    return relawed(tree, whole)


def law_cut_by_what_was_drawn(tree: TokenTree, toy: Toy) -> TokenTree:
    """To the token and its neighbour, renormalised."""

    def cut(slot: Slot, token: int) -> Law:
        tokens = np.array([[token, (token + 1) % 4]])
        row = toy.law(context(tree, slot.parent))[tokens]
        return Law(row / row.sum(), 0, (), tokens)

    return relawed(tree, cut)


def others_of_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 less what is in the columns of the node before."""
    laws = Lumped.laws
    monkeypatch.setattr(Lumped, "laws", lambda self, p, others: laws(self, p, np.roll(others, 1)))


def picks_stay_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their mass cannot be struck off."""
    laws = Lumped.laws

    def wrong(self: Lumped, inside: Any, others: Any) -> Any:
        p = laws(self, inside, others)
        (tree,) = self.trees
        for slot in tree.slots:
            if slot.law is PICK:
                p[slot.parent, 0] += p[slot.parent, tree.tokens[slot.node]]
        return p / p.sum(-1, keepdims=True)

    monkeypatch.setattr(Lumped, "laws", wrong)


@pytest.mark.parametrize("verifier", builders.LAW_VERIFIERS)
@pytest.mark.parametrize("look", [whole_law_recorded, law_cut_by_what_was_drawn])
def test_another_law_than_the_cut_one_shows(
    monkeypatch: pytest.MonkeyPatch, look: Look, verifier: Any
) -> None:
    far_away(monkeypatch, support=2)
    assert max(shifts(verifier)) < EXACT
    assert shows(shifts(verifier, look))


@pytest.mark.parametrize("verifier", builders.LAW_VERIFIERS)
@pytest.mark.parametrize("patch", [others_of_another_node, picks_stay_among_the_others])
def test_another_mass_of_others_shows(
    monkeypatch: pytest.MonkeyPatch, patch: Any, verifier: Any
) -> None:
    far_away(monkeypatch, support=2)
    patch(monkeypatch)
    assert shows(shifts(verifier))


@pytest.mark.parametrize("verifier", builders.LAW_VERIFIERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (  # the token of all others is drawn from the whole law
            "drawn, sums = draw_rows(others, ",
            "sums = others.sum(-1)\n    drawn, _ = draw_rows(p, ",
        ),
        ("(index, local, others_drawn)", "(index, local, others_drawn[::-1])"),
    ],
)
def test_a_broken_rule_shows(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, verifier: Any
) -> None:
    far_away(monkeypatch, support=2)
    verify = mutant("verify_far", old, new, verification)
    assert shows(shifts(verifier, verify=verify))


@pytest.mark.parametrize("verifier", builders.LAW_VERIFIERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tuple(own.get(token, OTHERS) for token in law.seen)", "()"),  # as if drawn anew
        ("law_row[columns] = probabilities", "law_row[columns] = probabilities[::-1]"),
    ],
)
def test_a_tree_lumped_wrongly_shows(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, verifier: Any
) -> None:
    far_away(monkeypatch, support=2)
    monkeypatch.setattr(verification, "lump", mutant("lump", old, new, lumping))
    assert shows(shifts(verifier))


# --- what it takes, and what it refuses -----------------------------------------------------------


def test_a_token_of_no_vocabulary_is_refused() -> None:
    tree = TokenTree(0)
    tree.add(0, 9)
    p = torch.full((2, 9), 1 / 9)
    for verifier in builders.LAW_VERIFIERS:
        with pytest.raises(LawError, match="9"):
            verify_all([Case(tree, verifier, request_generator(0, 0))], p)


def test_little_is_copied_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per pass and step, whatever its requests; nothing of it grows with the vocabulary."""
    copied: list[int] = []

    def counting(*tensors: Tensor) -> list[Any]:
        copied.append(sum(tensor.nbytes for tensor in tensors))
        return to_host(*tensors)

    monkeypatch.setattr(growth, "to_host", counting)
    monkeypatch.setattr(verification, "to_host", counting)
    monkeypatch.setattr(growth, "is_far", lambda tensor: True)
    generator = torch.Generator().manual_seed(0)
    laws = torch.softmax(torch.randn(40, 5000, generator=generator) * 8, -1)
    drawable = Drawable.of(laws)
    assert drawable.likeliest(1)[0] == [(int(laws[0].argmax()), float(drawable.rows[0, 0]))]
    assert copied == [40 * growth.SUPPORT * (4 + 8)]
    cases, rng = [], np.random.default_rng(0)
    for number, verifier in enumerate(VERIFIERS):
        tree = TokenTree(0)
        for node in range(12):
            rows, tokens = drawable.rows, drawable.tokens
            row = 13 * number + node
            add_without_replacement(tree, node, rows, row, 1, rng, tokens=tokens)
        cases.append(Case(tree, verifier, rng))
    cases.append(Case(TokenTree(0), verify_traversal, rng))
    verdicts = verify_all(cases, laws)
    assert all(verdict is not None and len(verdict.path) > 3 for verdict in verdicts[1:3])
    assert len(copied) == 2
    assert copied[1] <= len(VERIFIERS) * 12 * growth.SUPPORT * 4 + 40 * 16


@pytest.mark.gpu
def test_a_gpu_decides_as_a_processor() -> None:
    """The same laws and generators give the same verdicts, at a real vocabulary."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(25, 128_256, generator=generator) * 4
    p = torch.softmax(scores, -1)
    q = torch.softmax(scores + torch.randn(scores.shape, generator=generator) / 2, -1)
    drawn = {}
    for device in ("cpu", "cuda"):
        drawable = Drawable.of(q.to("cuda"))
        verdicts = []
        for seed in range(20):
            rng, tree = np.random.default_rng(seed), TokenTree(0)
            for node in range(12):
                rows, tokens = drawable.rows, drawable.tokens
                add_without_replacement(tree, node, rows, node, 2, rng, tokens=tokens)
            for verifier in VERIFIERS:
                case = Case(tree, verifier, request_generator(0, seed))
                verdicts += verify_all([case], p[: len(tree)].to(device))
        drawn[device] = [(each.path, each.next_token) for each in verdicts if each is not None]
    assert drawn["cpu"] == drawn["cuda"]
    assert any(path for path, _ in drawn["cpu"])
