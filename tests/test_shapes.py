"""Fixed shapes: every slot's recorded law is the one its token was drawn from."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specinfer import sampling
from specinfer.config import Draw
from specinfer.draft.base import Draft
from specinfer.draft.builders import SequoiaBuilder
from specinfer.draft.calibration import Calibration
from specinfer.draft.growth import Grown, Growth
from specinfer.draft.shapes import PathsShape, ShapeBuilder, TreeShape, best_shapes
from specinfer.logits import RowFilters, target_laws
from specinfer.request import SamplingParams
from specinfer.sampling import SeededNoise, gumbel_noise
from specinfer.tree import TokenTree
from specinfer.verify import require_lawful
from tests.engines import run_pages
from tests.helpers import children

VOCAB = 9
PLAIN = SamplingParams()


class Oracle:
    """A drafter whose logits are a function of the text before."""

    name = "oracle"

    def __init__(self, seed: int, support: int = VOCAB) -> None:
        self.seed = seed
        self.support = support
        self.calls: list[int] = []  # requests per pass

    def row(self, text: list[int]) -> Tensor:
        row = np.random.default_rng([self.seed, *text]).normal(0, 2, VOCAB)
        row[self.support :] = -np.inf
        return torch.from_numpy(row).float()

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor:
        self.calls.append(len(frontier))
        return torch.stack([self.row(text_to(d, n)) for d, nodes in frontier for n in nodes])

    def admit(self, accepted: Any) -> None: ...

    def drop(self, key: int) -> None: ...


def text_to(draft: Draft, node: int) -> list[int]:
    return [*draft.tokens, *(draft.tree.tokens[each] for each in draft.tree.path(node))]


def growth(
    draw: Draw = "iid",
    *,
    key: int = 0,
    params: SamplingParams = PLAIN,
    noise: SeededNoise | None = None,
    max_depth: int = 8,
) -> Growth:
    return Growth(
        key=key,
        tokens=[4, 2, key % VOCAB],
        pages=run_pages(64),
        params=params,
        draw=draw,
        regime="hot",
        rng=np.random.default_rng(key),
        noise=noise,
        sources=(0, 1),
        max_nodes=100,
        max_depth=max_depth,
    )


def grow(widths: tuple[int, ...], growths: list[Growth], drafters: list[Any]) -> list[Grown]:
    for each in growths:
        each.sources = range(len(drafters))
    return ShapeBuilder(TreeShape.of_widths(widths)).grow(growths, drafters)


def law_at(oracle: Oracle, draft: Draft, node: int, params: SamplingParams) -> np.ndarray:
    filters = RowFilters.of([(params, 1)])
    return target_laws(oracle.row(text_to(draft, node))[None], filters)[0].numpy()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, int]]:
    """Every law that a token was really drawn from, and the token."""
    seen: list[tuple[np.ndarray, int]] = []
    draw = sampling.draw

    def noting(law: np.ndarray, rng: Any) -> int:
        token = draw(law, rng)
        seen.append((law / law.sum(), token))
        return token

    monkeypatch.setattr(sampling, "draw", noting)
    return seen


@pytest.mark.parametrize("params", [PLAIN, SamplingParams(temperature=0.4, top_k=4)])
@pytest.mark.parametrize("draw", ["iid", "without-replacement"])
@pytest.mark.parametrize("widths", [(3, 2), (1, 1, 3, 1), (4,)])
def test_recorded_laws_are_those_used(
    drawn: list[tuple[np.ndarray, int]],
    draw: Draw,
    widths: tuple[int, ...],
    params: SamplingParams,
) -> None:
    oracle = Oracle(1)
    for key in range(5):
        drawn.clear()
        (grown,) = grow(widths, [growth(draw, key=key, params=params)], [oracle])
        tree, draft = grown.tree, grown.parts[0][0]
        assert len(drawn) == len(tree.slots)
        for slot, (used, token) in zip(tree.slots, drawn, strict=True):
            assert slot.law is not None
            assert not slot.law.is_pick
            assert tree.tokens[slot.node] == token
            np.testing.assert_allclose(slot.law.dense(), used, rtol=1e-5, atol=1e-7)
        for node in range(len(tree)):
            q = law_at(oracle, draft, node, params)
            before: list[int] = []
            for slot_id in tree.slots_of[node]:
                expected = q.copy()
                if draw == "without-replacement":
                    expected[before] = 0.0
                law = tree.slots[slot_id].law
                assert law is not None
                np.testing.assert_allclose(law.dense(), expected / expected.sum(), rtol=1e-5)
                before.append(tree.tokens[tree.slots[slot_id].node])
        require_lawful(tree, "topdown", VOCAB)


@pytest.mark.parametrize("draw", ["iid", "without-replacement", "pick"])
def test_every_node_gets_its_slots(draw: Draw) -> None:
    oracle = Oracle(2)
    (grown,) = grow((2, 1, 3), [growth(draw)], [oracle])
    tree = grown.tree
    for node in range(len(tree)):
        width = (2, 1, 3, 0)[tree.depths[node]]
        assert len(tree.slots_of[node]) == width
        if draw != "iid":
            assert len(children(tree, node)) == width
    assert oracle.calls == [1, 1, 1]  # one pass per level


@pytest.mark.parametrize("draw", ["iid", "without-replacement", "pick"])
def test_what_cannot_come_is_not_proposed(draw: Draw) -> None:
    (grown,) = grow((4, 3), [growth(draw)], [Oracle(3, support=2)])
    assert set(grown.tree.tokens[1:]) <= {0, 1}
    if draw != "iid":
        assert len(children(grown.tree, 0)) == 2  # two tokens are all there are


def best(scores: np.ndarray, count: int) -> list[int]:
    return np.argsort(-scores, kind="stable")[:count].tolist()


def test_picks_are_the_best_in_order() -> None:
    oracle = Oracle(4)
    (grown,) = grow((3, 1, 2), [growth("pick")], [oracle])
    tree = grown.tree
    for node in range(len(tree)):
        if tree.depths[node] < 3:
            row = oracle.row(text_to(grown.parts[0][0], node)).numpy()
            picked = [tree.tokens[child] for child in children(tree, node)]
            assert picked == best(row, (3, 1, 2)[tree.depths[node]])
    assert all(slot.law is not None and slot.law.is_pick for slot in tree.slots)


def test_seeded_picks_share_the_targets_noise() -> None:
    oracle, params = Oracle(5), SamplingParams(temperature=0.7, top_p=0.9, seed=11)
    noise = SeededNoise(11, 2, VOCAB)
    (grown,) = grow((3, 2), [growth("pick", params=params, noise=noise)], [oracle])
    tree, draft = grown.tree, grown.parts[0][0]
    for node in range(len(tree)):
        depth = tree.depths[node]
        if depth < 2:
            law = law_at(oracle, draft, node, params)
            with np.errstate(divide="ignore"):
                scores = np.log(law) + gumbel_noise(11, 2, len(draft.tokens) + depth, VOCAB)
            possible = [token for token in best(scores, (3, 2)[depth]) if law[token] > 0]
            assert [tree.tokens[child] for child in children(tree, node)] == possible


def shape_of(tree: TokenTree) -> list[tuple[int, int]]:
    return list(zip(tree.parents, tree.tokens, strict=True))


def mixed_growths() -> list[Growth]:
    """Requests of every kind and of different depths."""
    return [
        growth("pick", key=0, max_depth=2),
        growth("iid", key=1, params=SamplingParams(temperature=0.5), max_depth=3),
        growth("pick", key=2, noise=SeededNoise(7, 0, VOCAB), max_depth=1),
        growth("without-replacement", key=3),
        growth("pick", key=4, max_depth=2),
        growth("iid", key=5, max_depth=1),
    ]


@pytest.mark.parametrize("num_drafters", [1, 2])
def test_a_batch_grows_what_each_would_alone(num_drafters: int) -> None:
    oracles, widths = [Oracle(6), Oracle(7)][:num_drafters], (2, 1, 2, 1)
    together = grow(widths, mixed_growths(), oracles)
    assert oracles[0].calls == [6, 4, 2, 1]  # a pass per level for all that are open
    for index, grown in enumerate(together):
        (alone,) = grow(widths, [mixed_growths()[index]], oracles)
        assert shape_of(grown.tree) == shape_of(alone.tree)
        assert [s[:3] for s in grown.tree.slots] == [s[:3] for s in alone.tree.slots]


@pytest.mark.parametrize("draw", ["iid", "without-replacement", "pick"])
def test_two_drafters_keep_their_slots_and_laws(draw: Draw) -> None:
    oracles = [Oracle(8), Oracle(9)]
    for key in range(10):
        (grown,) = grow((3, 2), [growth(draw, key=key)], oracles)
        require_lawful(grown.tree, "traversal", VOCAB)
        slots = [(slot, grown.tree) for slot in grown.tree.slots]
        assert len(slots) == sum(len(draft.tree.slots) for draft, _ in grown.parts.values())
        for source, (draft, of) in grown.parts.items():
            assert [grown.tree.tokens[of[n]] for n in range(len(draft.tree))] == draft.tree.tokens
            merged = {
                (slot.parent, slot.node, id(slot.law and slot.law.rows))
                for slot in grown.tree.slots
                if slot.source == source
            }
            own = {
                (of[slot.parent], of[slot.node], id(slot.law and slot.law.rows))
                for slot in draft.tree.slots
            }
            assert merged == own
            check_own_paths(grown, source)


def check_own_paths(grown: Grown, source: int) -> None:
    """The part of each path that a drafter is told of is the part that it proposed."""
    draft, of = grown.parts[source]
    for node in range(len(grown.tree)):
        path = grown.tree.path(node)
        own = grown.own_path(source, path)
        assert [of[each] for each in own] == path[: len(own)]
        assert len(own) == len(path) or path[len(own)] not in of
        assert own == draft.tree.path(own[-1] if own else 0)


def test_levels_that_do_not_fit_are_left_out() -> None:
    for max_nodes, depth in ((1, 0), (2, 1), (7, 2), (8, 3)):
        one = growth("pick")
        one.max_nodes = max_nodes
        (grown,) = grow((2, 1, 2), [one], [Oracle(1)])
        assert max(grown.tree.depths) == depth


# --- independent paths ----------------------------------------------------------------------------


def test_paths_carry_their_number_down() -> None:
    """As many slots under a node as paths lead there, all from its one law."""
    for key in range(20):
        one = growth("iid", key=key)
        one.sources = [0]
        (grown,) = ShapeBuilder(PathsShape(5, 3)).grow([one], [Oracle(2, support=3)])
        tree = grown.tree
        for node in range(len(tree)):
            led = sum(slot.node == node for slot in tree.slots)
            expected = 0 if tree.depths[node] == 3 else led or 5
            assert len(tree.slots_of[node]) == expected
            assert (
                len({(id(tree.slots[s].law), tree.slots[s].parent) for s in tree.slots_of[node]})
                <= 1
            )


# --- Sequoia --------------------------------------------------------------------------------------


def expected_size(shape: TreeShape, places: np.ndarray, place: int = 0) -> float:
    return 1.0 + sum(
        places[rank] * expected_size(shape, places, shape.below(place, [rank]))
        for rank in range(shape.width(place, 0))
    )


def all_sizes(places: np.ndarray, num_nodes: int, depth: int) -> float:
    """The best expected size, by trying every way to share nodes among children."""

    @functools.cache
    def under(nodes: int, depth: int, place: int) -> float:
        """The best of places `place` … with so many nodes left, unconditionally."""
        if nodes == 0 or depth == 0 or place == len(places):
            return 0.0
        return max(
            (places[place] * (1.0 + under(m - 1, depth - 1, 0)) if m else 0.0)
            + under(nodes - m, depth, place + 1)
            for m in range(nodes + 1)
        )

    return 1.0 + under(num_nodes, depth, 0)


@pytest.mark.parametrize("seed", range(6))
def test_sequoias_shapes_are_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = np.sort(rng.dirichlet([0.7] * 5))[::-1] * rng.uniform(0.5, 1)
    table = best_shapes(places, 12, 5)
    for num_nodes, depth in ((1, 1), (3, 2), (7, 5), (12, 1), (12, 3), (12, 5)):
        shape = table.shape(num_nodes, depth)
        assert shape.depth <= depth
        assert shape.count(depth) <= num_nodes
        best = all_sizes(places, num_nodes, depth)
        assert table.sizes[depth, num_nodes] == pytest.approx(best, abs=1e-12)
        assert expected_size(shape, places) == pytest.approx(best, abs=1e-12)


def test_sequoias_size_follows_the_times() -> None:
    table = best_shapes(np.array([0.7, 0.15, 0.05]), 32, 8)
    sizes = table.sizes
    for draft_s, slope in ((0.0, 0.0), (0.1, 0.0), (0.05, 0.2), (5.0, 5.0)):
        target_s = 1.0 + slope * np.arange(34)
        num_nodes, depth = table.fastest(draft_s, target_s)
        cost = {
            (n, d): (d * draft_s + target_s[n + 1]) / sizes[d, n]
            for d in range(9)
            for n in range(33)
        }
        assert cost[num_nodes, depth] == pytest.approx(min(cost.values()))
    assert (num_nodes, depth) == (0, 0)  # where nothing is worth its time
    assert table.shape(0, 0).count(0) == 0


def test_sequoia_drafts_nothing_where_there_are_fewer_nodes_than_drafters() -> None:
    """Memory may leave any number; the other request's tree is what it is alone."""
    trees = []
    for most in ((1, 6), (6,)):
        asked = [growth("pick", key=max_nodes) for max_nodes in most]
        for one, max_nodes in zip(asked, most, strict=True):
            one.max_nodes = max_nodes
        builder = SequoiaBuilder(Calibration())
        trees.append([each.tree for each in builder.grow(asked, [Oracle(1), Oracle(2)])])
    assert [len(tree) for tree in trees[0]] == [1, len(trees[1][0])]
    assert trees[0][1].tokens == trees[1][0].tokens
    assert len(trees[1][0]) > 3
