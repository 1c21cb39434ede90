"""The law of trees that the production builders grow, by enumeration: every builder, verifier and
mix of sources, whatever is learnt, priced or shared, is exact; and looking at a drawn token shows.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from specinfer.baselines import verify_gbv, verify_kseq
from specinfer.draft import drawing
from specinfer.draft.builders import SequoiaBuilder
from specinfer.draft.calibration import REGIMES, Calibration, Fortune, Regime
from specinfer.draft.growth import Grown, Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.ngram import NgramDrafter
from specinfer.draft.prediction import PredictionDrafter
from specinfer.draft.rounds import Prices
from specinfer.draft.shapes import PathsShape, ShapeBuilder, TreeShape
from specinfer.errors import LawError
from specinfer.request import SamplingParams
from specinfer.tree import PICK, Law, TokenTree
from specinfer.verify import verify_match, verify_topdown, verify_traversal
from tests.engines import run_pages
from tests.oracle import (
    KINDS,
    ROOT,
    After,
    FailingToy,
    ToyDrafter,
    ToyPicker,
    continued,
    distance,
    emission,
    enumerate_chance,
    exact_laws,
    measure_drafted,
    outcomes,
    target_rows,
    toys,
    verify_greedy,
)

EXACT = 1e-9
SHIFTED = 1e-3
VERIFIERS = (verify_match, verify_topdown, verify_traversal)
LAW_VERIFIERS = (verify_topdown, verify_traversal)
BASELINES = (verify_kseq, verify_gbv)
TEXT = [1, 2, 0, 1, 2, 2, 0, 1, 1, 2, ROOT]  # repeats itself, for the n-grams
PREDICTION = [1, 2, 1]
PAGES = run_pages(64)


@pytest.fixture(autouse=True)
def _chance_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    enumerate_chance(monkeypatch)
    exact_laws(monkeypatch)


@dataclass
class Request:
    """One request of a step, as `Growth` has it."""

    draw: Any = "without-replacement"
    max_nodes: int = 3
    max_depth: int = 2
    regime: Regime = "hot"
    key: int = 0
    sources: Sequence[int] | None = None
    urgency: float = 1.0
    surprise: float = 0.0

    def growth(self, rng: Any, num_drafters: int) -> Growth:
        return Growth(
            key=self.key,
            tokens=TEXT,
            pages=PAGES,
            params=SamplingParams(),
            draw=self.draw,
            regime=self.regime,
            rng=rng,
            noise=None,
            sources=range(num_drafters) if self.sources is None else self.sources,
            max_nodes=self.max_nodes,
            max_depth=self.max_depth,
            prediction=PREDICTION,
            urgency=self.urgency,
            fortunes={source: fortune(self.surprise) for source in range(num_drafters)},
        )


def fortune(surprise: float) -> Fortune:
    """As a request's past may have left it."""
    fortune = Fortune()
    for _ in range(4):
        fortune.observe(0.5, 0.5 + surprise)
    return fortune


Make = Callable[[], Any]


def step(make: Make, requests: Sequence[Request], drafters: Sequence[Any]) -> Callable[..., Any]:
    """One step of a builder: what it has learnt before is the same in every replay."""
    return lambda rng: make().grow(
        [request.growth(rng, len(drafters)) for request in requests], drafters
    )


def drafted_by(
    make: Make, drafters: Sequence[Any], request: Request
) -> list[tuple[float, TokenTree]]:
    """Every tree of one request alone, with its chance."""
    grow = step(make, [request], drafters)
    return [(chance, grown.tree) for chance, (grown,) in outcomes(grow)]


def assert_exact(target: Any, drafted: Any, verifier: Any, length: int) -> None:
    outcome = measure_drafted(target, drafted, verifier, length)
    assert abs(outcome.mass - 1) < EXACT
    assert outcome.deviation < EXACT


# --- what is enumerated ---------------------------------------------------------------------------


def sources(name: str, kind: str, seed: int, vocab: int = 3) -> tuple[Any, list[Any]]:
    """A target and the drafters of a mix."""
    target, one, two = toys(kind, seed, vocab)
    first, second = ToyDrafter(one, "first"), ToyDrafter(two, "second")
    picker = ToyPicker(seed, vocab)
    return target, {
        "one model": [first],
        "two models": [first, second],
        "n-gram first": [picker, first],
        "n-gram last": [first, picker],
        "n-grams of the text": [NgramDrafter(), first],
        "a prediction": [first, PredictionDrafter()],
        "two models, n-gram, prediction": [first, picker, second, PredictionDrafter()],
        "no model": [NgramDrafter(), PredictionDrafter()],
    }[name]


MIXES = (
    "one model",
    "two models",
    "n-gram first",
    "n-gram last",
    "n-grams of the text",
    "a prediction",
    "two models, n-gram, prediction",
    "no model",
)


def learnt(seed: int) -> Calibration:
    """Tables with anything in them."""
    rng = np.random.default_rng([seed, 5])
    calibration = Calibration()
    for name, regime in itertools.product(("first", "second", "ngram", "prediction"), REGIMES):
        table = calibration.table(name, regime)
        for curves in (table.before, table.after):
            trials = rng.uniform(0.5, 9, curves.trials.shape)
            curves.reset(trials, trials * rng.uniform(0, 1, trials.shape))
    for regime in REGIMES:
        calibration.record_place(regime, 0, 1.0)
        calibration._places[regime][1] = rng.uniform(0, 9, 16)
        calibration._places[regime][0] = 9.0
    return calibration


def heap(calibration: Calibration | None, thresholds: float | None = None) -> Make:
    """Best-first trees; thresholds as if past trees had set them."""

    def make() -> HeapBuilder:
        builder = HeapBuilder(calibration)
        if thresholds is not None:
            for regime, nodes, depth in itertools.product(REGIMES, range(9), range(4)):
                builder._past.thresholds[regime, nodes, depth] = thresholds
        return builder

    return make


def shape(*widths: int) -> Make:
    return lambda: ShapeBuilder(TreeShape.of_widths(widths))


def paths(count: int, depth: int) -> Make:
    return lambda: ShapeBuilder(PathsShape(count, depth))


def sequoia(seed: int) -> Make:
    builder = SequoiaBuilder(learnt(seed))
    return lambda: builder  # its shapes come from the tables alone


def builders(seed: int, num_drafters: int = 1) -> dict[str, tuple[Make, Request]]:
    """Every builder, and a request that it grows for; shapes are small where many are merged."""
    tables = learnt(seed)
    widths = [(2, 1), (1, 1), (1,), (1,)][num_drafters - 1]
    doubled = [(1, 2), (2,), (1,), (1,)][num_drafters - 1]
    count, depth = [(2, 2), (2, 1), (1, 1), (1, 1)][num_drafters - 1]
    return {
        "best-first": (heap(None), Request()),
        "best-first, from the first round": (heap(None, 1e-3), Request(max_nodes=4)),
        "best-first, filled up": (heap(None, 0.9), Request(max_nodes=4)),
        "calibrated": (heap(tables), Request()),
        "calibrated, deep": (heap(tables, 0.2), Request(max_nodes=4, max_depth=3)),
        "best-first, picked": (heap(None), Request("pick", 6)),
        "calibrated, picked": (heap(tables), Request("pick", 5, 3)),
        "shape": (shape(*widths), Request(max_nodes=16)),
        "shape, independent": (shape(*doubled), Request("iid", 16)),
        "shape, picked": (shape(*widths), Request("pick", 16)),
        "paths": (paths(count, depth), Request("iid", 16)),
        "sequoia": (sequoia(seed), Request(max_nodes=4)),
        "sequoia, independent": (sequoia(seed + 1), Request("iid", 4)),
    }


BUILDERS = tuple(builders(0))

# --- exact: every builder, every mix of sources, every verifier -----------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder_is_exact(builder: str, mix: str) -> None:
    """All kinds of laws come by, three for each pair."""
    start = BUILDERS.index(builder) + 3 * MIXES.index(mix)
    for seed in range(start, start + 3):
        target, drafters = sources(mix, KINDS[seed % len(KINDS)], seed)
        make, request = builders(seed, len(drafters))[builder]
        drafted = drafted_by(make, drafters, request)
        for verifier in VERIFIERS:
            assert_exact(target, drafted, verifier, request.max_depth + 1)


@pytest.mark.parametrize("mix", ["one model", "two models", "n-gram last"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_a_drafter_that_fails_by_what_was_drawn_shifts_nothing(builder: str, mix: str) -> None:
    start = BUILDERS.index(builder)
    for seed in range(start, start + 2):
        target, drafters = failing(mix, seed)
        make, request = builders(seed, len(drafters))[builder]
        drafted = drafted_by(make, drafters, request)
        for verifier in VERIFIERS:
            assert_exact(target, drafted, verifier, request.max_depth + 1)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("builder", ["best-first", "calibrated, deep", "shape", "paths"])
def test_taking_a_failed_drafters_tree_back_shows(builder: str, verifier: Any) -> None:
    def shift(seed: int) -> float:
        target, drafters = failing("one model", seed)
        make, request = builders(seed)[builder]
        grow = step(make, [request], drafters)

        def grow_or_nothing(rng: Any) -> TokenTree:
            (grown,) = grow(rng)
            return TokenTree(ROOT) if drafters[0].is_failed else grown.tree

        drafted = outcomes(grow_or_nothing)
        return measure_drafted(target, drafted, verifier, request.max_depth + 1).deviation

    assert max(map(shift, range(6))) > SHIFTED


def failing(mix: str, seed: int) -> tuple[Any, list[Any]]:
    """A target, and drafters each of which fails at some paths."""
    target, drafters = sources(mix, KINDS[seed % len(KINDS)], seed)
    return target, [FailingToy(drafter, seed + n) for n, drafter in enumerate(drafters)]


@pytest.mark.parametrize("mix", ["one model", "n-gram first", "two models"])
def test_a_vocabulary_of_four_is_exact(mix: str) -> None:
    for seed, kind in enumerate(KINDS):
        target, drafters = sources(mix, kind, seed, vocab=4)
        calibration = learnt(seed) if seed % 2 else None
        drafted = drafted_by(heap(calibration, 0.1), drafters, Request(max_nodes=3))
        for verifier in LAW_VERIFIERS:
            assert_exact(target, drafted, verifier, 3)


@pytest.mark.parametrize("mix", MIXES)
def test_greedy_requests_get_the_greedy_text(mix: str) -> None:
    for seed, name in enumerate(BUILDERS):
        target, drafters = sources(mix, "one-hot target", seed)
        make, request = builders(seed, len(drafters))[name]
        if request.draw == "pick":
            request.regime = "greedy"
            drafted = drafted_by(make, drafters, request)
            for verifier in (lambda tree, p, rng: verify_greedy(tree, p), *VERIFIERS):
                assert_exact(target, drafted, verifier, request.max_depth + 1)


@pytest.mark.parametrize("verifier", BASELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_exact_on_independent_draws(kind: str, verifier: Any) -> None:
    for seed, (make, nodes) in enumerate(
        [(shape(2, 1), 16), (shape(3), 16), (paths(2, 2), 16), (paths(3, 1), 16), (sequoia(3), 4)]
    ):
        target, drafters = sources("one model", kind, seed)
        drafted = drafted_by(make, drafters, Request("iid", nodes))
        assert_exact(target, drafted, verifier, 3)


@pytest.mark.parametrize("verifier", BASELINES)
@pytest.mark.parametrize(
    ("builder", "mix"),
    [
        ("best-first", "one model"),
        ("calibrated", "n-gram first"),
        ("calibrated, picked", "one model"),
        ("shape", "one model"),
        ("shape, independent", "two models"),
        ("paths", "n-gram first"),
        ("sequoia", "one model"),
    ],
)
def test_baselines_refuse_what_is_not_independent(builder: str, mix: str, verifier: Any) -> None:
    target, drafters = sources(mix, "dense", 2)
    make, request = builders(2, len(drafters))[builder]
    drafted = drafted_by(make, drafters, request)
    with pytest.raises(LawError):
        measure_drafted(target, drafted, verifier, 3)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
def test_float32_laws_are_exact_to_their_rounding(
    monkeypatch: pytest.MonkeyPatch, verifier: Any
) -> None:
    """The whole path with softmax and filters: logits in, float32 rows recorded and drawn from."""
    monkeypatch.setattr(ToyDrafter, "expand", as_logits(ToyDrafter.expand))
    for seed, kind in enumerate(KINDS):
        target, drafters = sources("n-gram last", kind, seed)
        for name in ("best-first", "calibrated", "shape"):
            make, request = builders(seed, 2)[name]
            drafted = drafted_by(make, drafters, request)
            rows = [slot.law.rows for _, tree in drafted for slot in tree.slots if slot.law]
            assert {row.dtype for row in rows} == {np.dtype(np.float32)}
            outcome = measure_drafted(target, drafted, verifier, 3)
            assert abs(outcome.mass - 1) < 1e-6
            assert outcome.deviation < 1e-6


def as_logits(expand: Any) -> Any:
    return lambda drafter, frontier: expand(drafter, frontier).log().float()


# --- exact whatever is learnt, priced or shared ---------------------------------------------------


def prices(seed: int, num_drafters: int) -> Prices | None:
    """Any that are fixed before the step: none, next to nothing, some, more than all is worth."""
    rng = np.random.default_rng([seed, 6])
    scale = [None, 1e-6, 0.05, 0.3, 9.0][int(rng.integers(5))]
    if scale is None:
        return None
    nodes = np.sort(rng.exponential(scale, 16))
    if rng.random() < 0.5:
        nodes = np.repeat(nodes[::4], 4)  # as buckets have it
    totals = np.concatenate(([0.0], np.cumsum(nodes[:-1])))
    passes = [np.sort(rng.exponential(scale, 16)) * rng.random() for _ in range(num_drafters)]
    return Prices(nodes, totals, passes, [2 * each for each in passes])


def anything(seed: int) -> tuple[str, str, Make, list[Request]]:
    """A kind, a mix, a builder and one request or two, as some past could have left them."""
    rng = np.random.default_rng([seed, 7])
    mix = MIXES[seed % (len(MIXES) - 1)]
    _, drafters = sources(mix, "dense", seed)
    calibration = learnt(seed) if rng.random() < 0.7 else None
    threshold = float(10 ** rng.uniform(-3, -0.05))
    past = np.random.default_rng([seed, 8])
    usual = dict.fromkeys(REGIMES, float(past.uniform(0, 5)))
    priced = prices(seed, len(drafters))

    def make() -> HeapBuilder:
        builder = heap(calibration, threshold)()
        builder.prices = priced
        builder._past.sizes.update(usual)
        return builder

    requests = []
    for key in range(2):
        all_sources = list(range(len(drafters)))
        chosen = [each for each in all_sources if rng.random() < 0.8] or all_sources
        requests.append(
            Request(
                draw="pick" if key and rng.random() < 0.3 else "without-replacement",
                max_nodes=int(rng.integers(1, 4 - key)),
                max_depth=int(rng.integers(1, 4 - key)),
                regime=REGIMES[rng.integers(len(REGIMES))],
                key=key,
                sources=chosen,
                urgency=float(np.exp(rng.normal())),
                surprise=float(past.uniform(-0.5, 0.5)),
            )
        )
    return KINDS[seed % len(KINDS)], mix, make, requests[: 1 + (seed % 4 > 0)]


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("seed", range(56))
def test_control_shifts_nothing(seed: int, verifier: Any) -> None:
    """Prices, caps, urgency, tables, thresholds and fortunes of any kind, alone or with another:
    the requests' joint law is the product of their own."""
    kind, mix, make, requests = anything(seed)
    target, drafters = sources(mix, kind, seed)
    grow = step(make, requests, drafters)
    drafted = [(chance, [each.tree for each in grown]) for chance, grown in outcomes(grow)]
    targets = [target, After(target, (1,))][: len(requests)]
    assert joint_deviation(targets, drafted, verifier, 3) < EXACT


def joint_deviation(
    targets: Sequence[Any], drafted: Sequence[tuple[float, list[TokenTree]]], verifier: Any, n: int
) -> float:
    """From the joint law of the next n tokens of each request to the product of the targets'."""
    law: dict[Any, float] = defaultdict(float)
    for chance, trees in drafted:
        each = [emitted_law(*pair, verifier, n) for pair in zip(targets, trees, strict=True)]
        for texts in itertools.product(*each):
            share = np.prod([own[text] for own, text in zip(each, texts, strict=True)])
            law[texts] += chance * float(share)
    truths = [continued({(): 1.0}, target, n) for target in targets]
    truth = {
        texts: float(np.prod([own[text] for own, text in zip(truths, texts, strict=True)]))
        for texts in itertools.product(*truths)
    }
    assert abs(sum(law.values()) - 1) < EXACT
    return distance(law, truth)


def emitted_law(target: Any, tree: TokenTree, verifier: Any, n: int) -> dict[Any, float]:
    """The law of the next n tokens, given a tree."""
    p, emitted = target_rows(target, tree), defaultdict(float)
    for chance, verdict in outcomes(lambda rng: verifier(tree, p, rng)):
        emitted[emission(tree, verdict)] += chance
    return continued(emitted, target, n)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("mix", ["one model", "n-gram last"])
def test_learning_from_step_to_step_shifts_nothing(mix: str, verifier: Any) -> None:
    """Two steps, the second one's tables and thresholds taught by what the first one saw."""
    for seed, kind in enumerate(("dense", "zeros")):
        target, drafters = sources(mix, kind, seed)
        law: dict[Any, float] = defaultdict(float)

        def first(rng: Any, target: Any = target, drafters: Any = drafters) -> Any:
            return first_step(target, drafters, verifier, rng)

        for chance, (builder, text) in outcomes(first):
            thresholds = {("hot", 1, 1): max(builder._past.thresholds.values())}
            asked = [behind(drafter, text) for drafter in drafters]

            def second(calibration: Any = builder.calibration, thresholds: Any = thresholds) -> Any:
                taught = HeapBuilder(calibration)
                taught._past.thresholds = dict(thresholds)
                return taught

            for share, tree in drafted_by(second, asked, Request(max_nodes=1, max_depth=1)):
                for tokens, own in emitted_law(After(target, text), tree, verifier, 2).items():
                    law[*text, *tokens] += chance * share * own
        assert abs(sum(law.values()) - 1) < EXACT
        assert distance(continued(law, target, 5), continued({(): 1.0}, target, 5)) < EXACT


def first_step(target: Any, drafters: Sequence[Any], verifier: Any, rng: Any) -> Any:
    """One step, taught as the engine teaches: the builder, and what was committed."""
    calibration = Calibration()
    builder = HeapBuilder(calibration)
    (grown,) = builder.grow([Request(max_nodes=2).growth(rng, len(drafters))], drafters)
    tree = grown.tree
    verdict = verifier(tree, target_rows(target, tree), rng)
    for slot_id, accepted in verdict.examined:
        name = drafters[tree.slots[slot_id].source].name
        for _ in range(20):  # so that it matters
            calibration.record(name, "hot", grown.features[slot_id], accepted, Fortune())
    for key in builder._past.thresholds:
        builder._past.thresholds[key] = min(0.9, 0.3 * sum(tree.tokens) + 0.01)
    return builder, emission(tree, verdict)


def behind(drafter: Any, text: tuple[int, ...]) -> Any:
    if isinstance(drafter, ToyPicker):
        return ToyPicker(drafter.seed + 7 * len(text) + sum(text), drafter.vocab, drafter.name)
    return ToyDrafter(After(drafter.toy, text), drafter.name)


# --- whoever looks at a drawn token shows ---------------------------------------------------------

Look = Callable[[Grown], TokenTree]


def rebuilt(tree: TokenTree, slot_ids: Sequence[int], *, renew: bool = False) -> TokenTree:
    """The slots given, in this order; those whose parent is gone are left out.

    renew  record draws without replacement by the new order
    """
    new, nodes = TokenTree(tree.tokens[0]), {0: 0}
    seen: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for slot_id in slot_ids:
        slot = tree.slots[slot_id]
        if slot.parent in nodes:
            token, law = tree.tokens[slot.node], slot.law
            assert law is not None
            if renew and not law.is_pick:
                law = Law(law.rows, law.row, seen[slot.parent])
            seen[slot.parent] = (*seen[slot.parent], token)
            nodes[slot.node] = new.add(nodes[slot.parent], token, law=law)
    return new


def own_probability(tree: TokenTree, slot_id: int) -> float:
    slot = tree.slots[slot_id]
    assert slot.law is not None
    return 1.0 if slot.law.is_pick else float(slot.law.rows[slot.law.row, tree.tokens[slot.node]])


def in_order(tree: TokenTree, key: Callable[[int], Any]) -> list[int]:
    """Slots level by level, siblings sorted by a key."""
    slots = range(len(tree.slots))
    return sorted(slots, key=lambda s: (tree.depths[tree.slots[s].node], key(s)))


def prune_by_own_probability(grown: Grown) -> TokenTree:
    """The last slot under each node is dropped if its token is unlikely."""
    tree = grown.tree
    last = {slots[-1] for slots in tree.slots_of if slots}
    keep = [s for s in range(len(tree.slots)) if s not in last or own_probability(tree, s) > 0.35]
    return rebuilt(tree, keep)


def sort_by_own_probability(grown: Grown) -> TokenTree:
    tree = grown.tree
    order = in_order(tree, lambda slot: -own_probability(tree, slot))
    return rebuilt(tree, order, renew=True)


def sort_by_token(grown: Grown) -> TokenTree:
    tree = grown.tree
    order = in_order(tree, lambda slot: tree.tokens[tree.slots[slot].node])
    return rebuilt(tree, order, renew=True)


def values(grown: Grown) -> tuple[list[float], list[float]]:
    """Per slot what it was worth before its draw, and what its token is worth."""
    reach, before, after = {0: 1.0}, [], []
    left: dict[int, float] = {}
    for slot_id, slot in enumerate(grown.tree.slots):
        features = grown.features[slot_id]
        reached = left.get(slot.parent, reach[slot.parent])
        before.append(reached * features.before)
        after.append(reached * features.after)
        reach[slot.node] = reached * features.after
        left[slot.parent] = reached * (1 - features.after)
    return before, after


def size_by_this_steps_goodput(grown: Grown) -> TokenTree:
    """Drawn first, then cut to the size with the most expected tokens per second."""
    _, after = values(grown)
    tokens = 1 + np.concatenate(([0.0], np.cumsum(after)))
    seconds = 1 + 0.3 * np.arange(len(tokens))
    return rebuilt(grown.tree, range(int((tokens / seconds).argmax())))


def threshold_from_this_tree(grown: Grown) -> TokenTree:
    """Slots are kept while their value before the draw is above what this tree's tokens average."""
    before, after = values(grown)
    below = np.flatnonzero(np.array(before) < np.mean(after))
    return rebuilt(grown.tree, range(int(below[0]) if len(below) else len(before)))


def picks_first(grown: Grown) -> TokenTree:
    """A pick goes before the drawn sibling whose token it avoids."""
    tree = grown.tree
    order = in_order(tree, lambda slot: tree.slots[slot].law is not PICK)
    return rebuilt(tree, order, renew=True)


def drop_repeats(grown: Grown) -> TokenTree:
    tree, first = grown.tree, {}
    for slot_id, slot in enumerate(tree.slots):
        first.setdefault(slot.node, slot_id)
    return rebuilt(tree, sorted(first.values()))


def likeliest_instead_of_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def top(own: Any, rng: Any) -> tuple[int, float]:
        rest = own.law.rows[own.law.row].copy()
        rest[own.struck] = 0.0
        return int(rest.argmax()), float(rest.max()) / own.mass

    monkeypatch.setattr(drawing._Law, "draw", top)


def plain_law_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "Law", lambda rows, row, seen, tokens: Law(rows, row))


def pick_recorded_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    add = drawing.Drawing._add

    def adding(self: Any, tree: Any, place: Any, source: int) -> None:
        seen = place.seen
        add(self, tree, place, source)
        slots = tree.draft.tree.slots
        for own in place.laws.values():
            if slots[-1].law is PICK and own.law.rows[own.law.row, place.seen[-1]] > 0:
                slots[-1] = slots[-1]._replace(law=replace(own.law, seen=seen))

    monkeypatch.setattr(drawing.Drawing, "_add", adding)


WITHIN = {  # what is patched inside the builder; the mix that shows it
    "likeliest instead of drawn": (likeliest_instead_of_drawn, "one model"),
    "plain law recorded": (plain_law_recorded, "one model"),
    "pick recorded as drawn": (pick_recorded_as_drawn, "n-gram first"),
}
BEHIND: dict[str, tuple[Look, str, str]] = {  # what is done to its trees; builder and mix
    "pruned by own probability": (prune_by_own_probability, "calibrated", "one model"),
    "sorted by own probability": (sort_by_own_probability, "calibrated", "one model"),
    "sorted by token": (sort_by_token, "calibrated", "one model"),
    "size by this step's goodput": (size_by_this_steps_goodput, "calibrated", "one model"),
    "threshold from this tree": (threshold_from_this_tree, "calibrated", "one model"),
    "picks put first": (picks_first, "calibrated", "a prediction"),
    "repeats dropped": (drop_repeats, "shape, independent", "one model"),
    "repeats of another model dropped": (drop_repeats, "shape, independent", "two models"),
}


def shifts(builder: str, mix: str, verifier: Any, look: Look) -> Iterator[float]:
    """How far the law is shifted, for a few models."""
    for seed in range(8):
        target, drafters = sources(mix, "dense", seed)
        make, request = builders(seed, len(drafters))[builder]
        grow = step(make, [request], drafters)
        drafted = [(chance, look(grown)) for chance, (grown,) in outcomes(grow)]
        yield measure_drafted(target, drafted, verifier, 3).deviation


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("mutation", WITHIN)
def test_a_false_law_in_the_builder_shows(
    monkeypatch: pytest.MonkeyPatch, mutation: str, verifier: Any
) -> None:
    patch, mix = WITHIN[mutation]
    assert max(shifts("best-first", mix, verifier, lambda grown: grown.tree)) < EXACT
    patch(monkeypatch)
    shifted = shifts("best-first", mix, verifier, lambda grown: grown.tree)
    assert any(shift > SHIFTED for shift in shifted)


@pytest.mark.parametrize("verifier", LAW_VERIFIERS)
@pytest.mark.parametrize("mutation", BEHIND)
def test_looking_at_drawn_tokens_shows(mutation: str, verifier: Any) -> None:
    look, builder, mix = BEHIND[mutation]
    assert any(shift > SHIFTED for shift in shifts(builder, mix, verifier, look))
