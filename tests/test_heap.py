"""Best-first growth: which nodes are kept, what drafters are asked, and what is never exceeded."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

from specinfer.draft import picking
from specinfer.draft.calibration import Calibration
from specinfer.draft.growth import Grown, Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.rounds import LEAST, WIDEST, Prices, Queue
from specinfer.request import SamplingParams
from specinfer.tree import TokenTree
from specinfer.verify import require_lawful
from tests.engines import run_pages
from tests.oracle import Toy, ToyDrafter, ToyPicker, exact_laws

VOCAB = 12
PAGES = run_pages(4096)


@pytest.fixture(autouse=True)
def _laws_are_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_laws(monkeypatch)


def model(seed: int, name: str = "model", vocab: int = VOCAB) -> ToyDrafter:
    return ToyDrafter(Toy(seed, vocab, lambda rng: rng.dirichlet([0.3] * vocab) + 1e-4), name)


def growth(draw: Any = "pick", key: int = 0, **changes: Any) -> Growth:
    options = {
        "max_nodes": 12,
        "max_depth": 5,
        "sources": [0],
        "rng": np.random.default_rng(key),
        "params": SamplingParams(),
        "regime": "hot",
        "noise": None,
    } | changes
    return Growth(key=key, tokens=[4, 2, key % VOCAB], pages=PAGES, draw=draw, **options)


def grow(growths: list[Growth], drafters: list[Any], builder: HeapBuilder | None = None) -> Any:
    return (builder or HeapBuilder()).grow(growths, drafters)


def priced(
    price: float, *, rounds: float = 0.0, calibration: Calibration | None = None, size: int = 400
) -> HeapBuilder:
    """Each node costs the same, each pass as well."""
    builder = HeapBuilder(calibration)
    nodes = np.full(size, price)
    passes = [np.full(size, rounds)] * 2
    builder.prices = Prices(nodes, price * np.arange(size), passes, passes)
    return builder


def learnt(seed: int = 0) -> Calibration:
    """Tables far from what drafters say themselves."""
    calibration, rng = Calibration(), np.random.default_rng(seed)
    for name, regime in itertools.product(("model", "other", "ngram"), ("hot", "cold")):
        table = calibration.table(name, regime)  # type: ignore[arg-type]
        for curves in (table.before, table.after):
            trials = np.full(curves.trials.shape, 10.0)
            curves.reset(trials, 10 * np.sort(rng.uniform(0, 1, trials.shape), axis=1))
    return calibration


def own(grown: Grown, node: int) -> tuple[int, ...]:
    return tuple(grown.tree.tokens[each] for each in grown.tree.path(node))


# --- what drafters are asked ----------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("price", [None, 0.0, 0.02, 0.2])
@pytest.mark.parametrize("draw", ["pick", "without-replacement", "both"])
def test_drafters_are_asked_no_more_than_they_can_hold(
    draw: str, price: float | None, calibrated: bool
) -> None:
    """Passes ≤ depth, nodes ≤ max_nodes, the root first and alone, parents before children."""
    draws = {"both": ("pick", "without-replacement")}.get(draw, (draw, draw))
    for seed, (nodes, depth) in enumerate([(1, 4), (5, 1), (7, 3), (40, 6), (3, 8)]):
        drafters = [model(seed), ToyPicker(seed, VOCAB, "other")]
        calibration = learnt(seed) if calibrated else None
        builder = HeapBuilder(calibration)
        if price is not None:
            builder = priced(price, rounds=price, calibration=calibration)
        growths = [
            growth(draws[0], 0, max_nodes=nodes, max_depth=depth, sources=[0, 1]),
            growth(draws[1], 1, max_nodes=nodes + 2, max_depth=depth, sources=[seed % 2]),
            growth(draws[0], 2, max_nodes=2, max_depth=1, sources=[1, 0]),
        ]
        results = grow(growths, drafters, builder)
        for source, drafter in enumerate(drafters):
            assert len(drafter.asked) <= depth
            for each, result in zip(growths, results, strict=True):
                asked = [ns for call in drafter.asked for key, ns in call if key == each.key]
                assert (source in result.parts) == bool(asked)
                if not asked:
                    continue
                assert source in each.sources
                check_asked(asked, result, source, each)
        for each, result in zip(growths, results, strict=True):
            assert result.tree.num_drafted <= each.max_nodes
            assert max(result.tree.depths) <= each.max_depth
            require_lawful(result.tree, "traversal", VOCAB)
            if each.draw != "pick" or not calibrated:  # else siblings stand by value
                check_features(each, result, drafters)


def check_asked(asked: list[list[int]], grown: Grown, source: int, each: Growth) -> None:
    draft, of = grown.parts[source]
    assert asked[0] == [0]
    known: set[int] = set()
    for nodes in asked:
        assert not known & set(nodes), "a node is asked about once"
        assert all(node == 0 or draft.tree.parents[node] in known for node in nodes)
        known |= set(nodes)
    assert draft.tree.num_drafted <= each.max_nodes
    assert max(draft.tree.depths[node] for node in known) < each.max_depth
    assert len(of) == len(draft.tree)
    for node, kept in enumerate(of):
        if kept >= 0:
            path = [draft.tree.tokens[n] for n in draft.tree.path(node)]
            assert own(grown, kept) == tuple(path)
    for node in range(len(grown.tree)):
        path = grown.tree.path(node)
        told = grown.own_path(source, path)
        assert [of[n] for n in told] == path[: len(told)]
        assert len(told) == len(path) or path[len(told)] not in of
        assert told == draft.tree.path(told[-1] if told else 0)


def check_features(each: Growth, grown: Grown, drafters: list[Any]) -> None:
    """rank: the place among siblings; before, after: largest and own share of what is left."""
    tree = grown.tree
    assert set(grown.features) == set(range(len(tree.slots)))
    for node, slots in enumerate(tree.slots_of):
        seen: list[int] = []
        for rank, slot_id in enumerate(slots):
            slot, features = tree.slots[slot_id], grown.features[slot_id]
            token = tree.tokens[slot.node]
            said = drafters[slot.source]
            key = (*((each.key,) if each.key else ()), *own(grown, node))
            if isinstance(said, ToyPicker):
                law = np.zeros(VOCAB)
                for pick, chance in said.picks(key):
                    law[pick] = chance
                left = 1 - law[seen].sum()
            else:
                law = said.toy.law(key)
                left = 1 - law[seen].sum()
            rest = law.copy()
            rest[seen] = 0
            assert features.rank == rank
            assert features.after == pytest.approx(rest[token] / left, rel=1e-6)
            largest = rest.max() / left
            if slot.law is not None and slot.law.is_pick:
                assert features.before == features.after
                assert features.after == pytest.approx(largest, rel=1e-6)
            elif rank < 8:  # behind the eight likeliest it is a bound
                assert features.before == pytest.approx(largest, rel=1e-6)
            seen.append(token)


def test_a_source_is_asked_only_where_it_knows_the_parent() -> None:
    """A pass that is too dear for one drafter leaves it out of everything below."""
    drafters = [model(0), model(1, "other")]
    builder = priced(0.0)
    assert builder.prices is not None
    dear = np.full(400, 0.9999)
    passes = [np.zeros(400), dear]
    builder.prices = Prices(builder.prices.nodes, builder.prices.totals, passes, passes)
    for draw in ("pick", "without-replacement"):
        (grown,) = grow([growth(draw, sources=[0, 1], max_nodes=20)], drafters, builder)
        assert len(drafters[1].asked) == 1  # the root was worth it: it is reached for certain
        assert drafters[1].asked == [[(0, [0])]]
        assert len(drafters[0].asked) > 1
        assert set(grown.parts) == {0, 1}
        for drafter in drafters:
            drafter.asked.clear()


# --- which nodes are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
def test_picked_trees_are_the_best_of_what_was_expanded(calibrated: bool) -> None:
    for seed in range(8):
        drafter, calibration = model(seed), learnt(seed) if calibrated else None
        table = calibration.table("model", "hot") if calibration else None
        each = growth(max_nodes=15, max_depth=4)
        (grown,) = grow([each], [drafter], HeapBuilder(calibration))
        draft = grown.parts[0][0]
        asked = [node for call in drafter.asked for _, nodes in call for node in nodes]
        expanded = [tuple(draft.tree.tokens[n] for n in draft.tree.path(node)) for node in asked]
        values = all_values(drafter, expanded, each, table)
        best = sorted(values, key=lambda path: -values[path])[: each.max_nodes]
        kept = {own(grown, node) for node in range(1, len(grown.tree))}
        assert kept == set(best)
        assert all(path[:-1] in kept or len(path) == 1 for path in kept)


def all_values(
    drafter: ToyDrafter, expanded: list[tuple[int, ...]], each: Growth, table: Any
) -> dict[tuple[int, ...], float]:
    """The value of each guess after the expanded nodes: parents were expanded first."""
    values: dict[tuple[int, ...], float] = {(): 1.0}
    for path in expanded:
        law, value, seen = drafter.toy.law(path), values[path], 0.0
        for rank, token in enumerate(np.argsort(-law, kind="stable")[: min(24, each.max_nodes)]):
            share = law[token] / (1 - seen)
            rate = share if table is None else table.after.at(rank, share)
            if value * rate > LEAST:
                values[*path, int(token)] = value * rate
            value *= 1 - rate
            seen += law[token]
    del values[()]
    return values


def test_with_nothing_to_pay_all_that_is_worth_anything_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picking, "PRICED_WIDEST", WIDEST)
    drafter = model(3)
    each = growth(max_nodes=200, max_depth=2)
    (grown,) = grow([each], [drafter], priced(0.0))
    draft = grown.parts[0][0]
    asked = [node for call in drafter.asked for _, nodes in call for node in nodes]
    expanded = [tuple(draft.tree.tokens[n] for n in draft.tree.path(node)) for node in asked]
    values = all_values(drafter, expanded, each, None)
    assert {own(grown, node) for node in range(1, len(grown.tree))} == set(values)
    assert len(asked) == 1 + 4  # a priced round expands four nodes of a request


@pytest.mark.parametrize("price", [0.03, 0.15, 0.5])
@pytest.mark.parametrize("draw", ["pick", "without-replacement"])
def test_no_slot_is_worth_less_than_its_price(draw: str, price: float) -> None:
    for seed in range(6):
        growths = [growth(draw, key, max_nodes=30) for key in range(3)]
        for each, grown in zip(growths, grow(growths, [model(seed)], priced(price)), strict=True):
            before, after = values_of(grown)
            worth = after if draw == "pick" else before
            assert all(value >= price for value in worth)
            assert each.draw == draw


def values_of(grown: Grown) -> tuple[list[float], list[float]]:
    """Per slot its value before its draw and after it, by what drafters say."""
    reach, left, before, after = {0: 1.0}, {}, [], []  # type: ignore[var-annotated]
    for slot_id, slot in enumerate(grown.tree.slots):
        features = grown.features[slot_id]
        reached = left.get(slot.parent, reach[slot.parent])
        before.append(reached * features.before)
        after.append(reached * features.after)
        reach[slot.node] = reached * features.after
        left[slot.parent] = reached * (1 - features.after)
    return before, after


def test_totals_decide_how_many_picks_are_kept() -> None:
    """A step is dear, then cheap up to the next bucket: the best number of nodes, by trying all."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        builder = priced(0.0)
        totals = np.cumsum(rng.choice([0.0, 0.5], 400, p=[0.8, 0.2]))
        builder.prices = Prices(np.zeros(400), totals, [np.zeros(400)], [np.zeros(400)])
        growths = [growth(key=key, max_nodes=8, urgency=1.0 + key) for key in range(3)]
        grown = grow(growths, [model(seed)], builder)
        free = grow(growths, [model(seed)], priced(0.0))
        worth = sorted(
            (value * each.urgency for each, g in zip(growths, free, strict=True)
             for value in values_of(g)[1]),
            reverse=True,
        )  # fmt: skip
        gains = np.concatenate(([0.0], np.cumsum(worth))) - totals[: len(worth) + 1]
        assert sum(each.tree.num_drafted for each in grown) == int(gains.argmax())


def test_dear_rounds_leave_plain_decoding() -> None:
    for draw in ("pick", "without-replacement"):
        drafter = model(0)
        (grown,) = grow([growth(draw)], [drafter], priced(0.0, rounds=2.0))
        assert grown.tree.num_drafted == 0
        assert not grown.parts
        assert not drafter.asked


def test_prices_that_end_before_the_batch_does_go_on_as_they_end() -> None:
    growths = [growth("without-replacement", 0), growth("pick", 1)]
    builder = priced(0.0, size=4)
    drawn, picked = grow(growths, [model(0)], builder)
    assert drawn.tree.num_drafted > 4
    assert picked.tree.num_drafted == 0


def test_urgency_takes_nodes_from_others() -> None:
    for draw in ("pick", "without-replacement"):
        sizes = []
        for urgency in (0.2, 1.0, 5.0):
            growths = [growth(draw, 0, urgency=urgency, max_nodes=60), growth(draw, 1)]
            first, _ = grow(growths, [model(1)], priced(0.1))
            sizes.append(first.tree.num_drafted)
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("draw", ["pick", "without-replacement"])
def test_requests_grown_together_grow_as_alone_where_sizes_are_given(draw: str) -> None:
    calibration = learnt(2)

    def requests() -> list[Growth]:
        return [
            growth(draw, 0, regime="hot", max_nodes=9),
            growth(draw, 1, regime="cold", max_nodes=20, max_depth=3),
            growth(draw, 2, regime="cold", max_nodes=1, max_depth=1),
        ]

    together = grow(requests(), [model(5)], HeapBuilder(calibration))
    for index, grown in enumerate(together):
        (alone,) = grow([requests()[index]], [model(5)], HeapBuilder(calibration))
        assert alone.tree.tokens == grown.tree.tokens
        assert alone.tree.parents == grown.tree.parents


# --- the source of a draw -------------------------------------------------------------------------


def test_the_surest_source_draws_first() -> None:
    """By what is known before the draw: picks by their own chance, laws by their largest."""
    for seed in range(20):
        law_of, picker = model(seed), ToyPicker(seed, VOCAB)
        each = growth("without-replacement", max_nodes=6, max_depth=1, sources=[0, 1])
        (grown,) = grow([each], [law_of, picker])
        law, queue = law_of.toy.law(()), Queue(1, picker.picks(()))
        seen: set[int] = set()
        for slot in grown.tree.slots:
            rest = law.copy()
            rest[list(seen)] = 0
            largest = rest.max() / (1 - law[list(seen)].sum())
            pick = queue.next(seen)
            picked = pick is not None and pick[1] > largest
            assert slot.source == int(picked)
            token = grown.tree.tokens[slot.node]
            assert slot.law is not None
            assert slot.law.is_pick == picked
            assert not picked or (pick is not None and token == pick[0])
            if not picked:
                assert slot.law.seen == tuple(grown.tree.tokens[n + 1] for n in range(len(seen)))
            seen.add(token)


@pytest.mark.parametrize("draw", ["pick", "without-replacement"])
def test_laws_that_are_used_up_end_the_tree(draw: str) -> None:
    """One-hot laws, and laws of two halves: no slot of probability 0, and no warning."""
    for shape in (np.eye(VOCAB)[3], (np.eye(VOCAB)[1] + np.eye(VOCAB)[5]) / 2):
        for calibration in (None, learnt()):
            drafter = ToyDrafter(Toy(0, VOCAB, lambda rng, shape=shape: shape))
            each = growth(draw, max_nodes=9, max_depth=3)
            (grown,) = grow([each], [drafter], HeapBuilder(calibration))
            assert set(grown.tree.tokens[1:]) <= set(np.flatnonzero(shape))
            require_lawful(grown.tree, "traversal", VOCAB)


@pytest.mark.parametrize("draw", ["pick", "without-replacement"])
def test_a_large_tree_takes_few_passes_and_little_time(draw: str) -> None:
    """2048 nodes; many times the seconds expected, and our own rather than the clock's."""
    drafter = model(0, vocab=64)
    drafter.expand = wide(64)  # type: ignore[method-assign]
    each = growth(draw, max_nodes=2048, max_depth=16)
    start = time.process_time()
    (grown,) = grow([each], [drafter])
    assert time.process_time() - start < 5.0
    assert 1800 < grown.tree.num_drafted <= 2048  # picks worth next to nothing are not kept


def wide(vocab: int) -> Any:
    rng = np.random.default_rng(0)

    def expand(frontier: Any) -> Any:
        count = sum(len(nodes) for _, nodes in frontier)
        return torch.from_numpy(rng.dirichlet([0.5] * vocab, count))

    return expand


def test_thresholds_leave_about_a_tenth_to_fill() -> None:
    """Over many steps: most nodes are drawn as soon as they are worth it, few at the end."""
    builder, drafters = HeapBuilder(), [model(2)]
    for key in range(120):
        grow([growth("without-replacement", key, max_nodes=16)], drafters, builder)
    (threshold,) = builder._past.thresholds.values()
    assert 1e-3 < threshold < 0.9
    assert set(builder._past.thresholds) == {("hot", 16, 5)}


def test_an_empty_answer_grows_nothing() -> None:
    for draw in ("pick", "without-replacement"):
        picker = ToyPicker(0, VOCAB)
        picker.picks = lambda context: []  # type: ignore[method-assign]
        (grown,) = grow([growth(draw)], [picker])
        assert grown.tree.num_drafted == 0
        assert list(grown.parts) == [0]
        assert isinstance(grown.tree, TokenTree)
