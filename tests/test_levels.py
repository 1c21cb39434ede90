"""Trees filled by one graph are those grown level by level, token by token and key by key."""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from specinfer.cache.blocks import Pages
from specinfer.config import Speculation
from specinfer.draft.base import DrafterFailedError, Planned
from specinfer.draft.growth import Grown, Growth
from specinfer.draft.model import ModelDrafter
from specinfer.draft.shapes import PathsShape, Shape, ShapeBuilder, TreeShape
from specinfer.engine.stats import EngineStats
from specinfer.engine.timed_drafter import TimedDrafter
from specinfer.history import History
from specinfer.models.decoder import Decoder
from specinfer.ops.transfer import to_host
from specinfer.request import SamplingParams
from specinfer.run import graph
from specinfer.run.runner import Runner
from specinfer.sampling import SeededNoise
from specinfer.tree import TokenTree
from tests.engines import (
    finish,
    keys_and_values,
    outputs_of,
    scattered_pages,
    toy_decoder,
    toy_engine,
)
from tests.test_graph import DEVICE, Captures, steps_of

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

VOCAB = 61
NUM_SLOTS = 192
SHAPES = {
    "1,1,1": TreeShape.of_widths((1, 1, 1)),
    "2,1,1": TreeShape.of_widths((2, 1, 1)),
    "3,2": TreeShape.of_widths((3, 2)),
    "one level": TreeShape.of_widths((4,)),
    "paths": PathsShape(3, 2),
    "ragged": TreeShape([[1, 2, 3], [4], [], [5, 6], [7], [], [], []]),
}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
"""What levels do to a model does not grow with it, and the interpreter takes 10 ms a program."""
SEVERAL = {"num_attention_heads": 4, "num_key_value_heads": 2}
GROUPED = {"num_attention_heads": 3, "num_key_value_heads": 1}
WINDOWED = {"family": "MistralForCausalLM", "sliding_window": 5}


class Pair:
    """Two drafters of one model, of which one grows level by level."""

    def __init__(self, decoder: Decoder, vocab_size: int = VOCAB) -> None:
        self.captures = Captures(), Captures()
        self.runners = [device_runner(decoder, each) for each in self.captures]
        self.drafters = [
            ModelDrafter("toy", runner, vocab_size=vocab_size, max_tokens=100)
            for runner in self.runners
        ]
        assert self.drafters[0].has_levels
        self.drafters[1].has_levels = False

    def grow(self, shape: Shape, make: Callable[[], list[Growth]]) -> list[list[Grown]]:
        """The trees of both, which are the same, and so is what the drafters know of them."""
        grown = [ShapeBuilder(shape).grow(make(), [drafter]) for drafter in self.drafters]
        for one, other in zip(*grown, strict=True):
            assert one.tree.tokens == other.tree.tokens
            assert one.tree.parents == other.tree.parents
            assert [slot[:3] for slot in one.tree.slots] == [slot[:3] for slot in other.tree.slots]
            assert one.tree.slots_of == other.tree.slots_of
        return grown


def device_runner(decoder: Decoder, captures: Captures) -> Runner:
    steps = steps_of(decoder, captures, NUM_SLOTS)
    runner = Runner(steps._decoder, NUM_SLOTS)
    runner.pool, runner._device_steps = steps._pool, steps
    return runner


@functools.cache
def pages_of(key: int) -> Pages:
    """One of four requests' scattered pages."""
    share = NUM_SLOTS // 16
    blocks = scattered_pages(NUM_SLOTS, 4, NUM_SLOTS).blocks
    return Pages(blocks[key * share : (key + 1) * share], 4)


def growth(key: int, tokens: list[int], **changes: Any) -> Growth:
    options: dict[str, Any] = {
        "key": key,
        "tokens": tokens,
        "pages": pages_of(key),
        "params": SamplingParams(),
        "draw": "pick",
        "regime": "greedy",
        "rng": np.random.default_rng(key),
        "noise": None,
        "sources": (0,),
        "max_nodes": 30,
        "max_depth": 8,
    }
    return Growth(**options | changes)


def states_of(drafter: ModelDrafter) -> dict[int, tuple[Any, ...]]:
    return {
        key: (state.num_computed, state.num_noted, state.keys, state.ancestors)
        for key, state in drafter._states.items()
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("2,1,1", {}),
        ("one level", SEVERAL),
        ("ragged", WINDOWED),
        *[pytest.param(name, {}, marks=pytest.mark.slow) for name in ("1,1,1", "paths")],
        pytest.param("3,2", GROUPED, marks=pytest.mark.slow),
    ],
)
def test_trees_are_those_grown_level_by_level(name: str, changes: dict[str, Any]) -> None:
    """Two steps of three requests, of different lengths, depths and temperatures."""
    shape = SHAPES[name]
    pair = Pair(toy_decoder(3, **SMALL | changes))
    texts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    depths, temperatures = (8, 1, 2), (1.0, 0.3, 1.0)

    def make() -> list[Growth]:
        return [
            growth(n, list(text), max_depth=d, params=SamplingParams(temperature=t))
            for n, (text, d, t) in enumerate(zip(texts, depths, temperatures, strict=True))
        ]

    for _ in range(2):
        grown = pair.grow(shape, make)
        assert [max(each.tree.depths) for each in grown[0]] == [min(shape.depth, d) for d in depths]
        assert states_of(pair.drafters[0]) == states_of(pair.drafters[1])
        for each in make():
            stop = len(each.tokens) + len(pair.drafters[0]._states[each.key].keys)
            ours, theirs = (keys_and_values(r, each.pages, stop) for r in pair.runners)
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        paths = [each.tree.path(len(each.tree) - 1) for each in grown[0]]
        for drafter, trees in zip(pair.drafters, grown, strict=True):
            drafter.admit(
                [(each.parts[0][0], path) for each, path in zip(trees, paths, strict=True)]
            )
        for text, each, path in zip(texts, grown[0], paths, strict=True):
            text += [*(each.tree.tokens[node] for node in path), 12]
    assert pair.captures[0].replays == 2 + 1  # before the first, all but the prompts' newest tokens
    assert pair.captures[1].replays == 2 * shape.depth


@pytest.mark.parametrize("vocab_size", [50, 80])
def test_tokens_are_of_the_targets_vocabulary(vocab_size: int) -> None:
    pair = Pair(toy_decoder(3, **SMALL), vocab_size)
    grown = pair.grow(SHAPES["3,2"], lambda: [growth(0, [1, 2, 3])])
    assert max(grown[0][0].tree.tokens) < min(VOCAB, vocab_size)


def test_a_tree_is_one_replay_and_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    for module in ("specinfer.run.graph", "specinfer.draft.growth"):
        monkeypatch.setattr(
            f"{module}.to_host", lambda *each: copies.append(len(each)) or to_host(*each)
        )
    captures = Captures()
    runner = device_runner(toy_decoder(3, **SMALL), captures)
    drafter = ModelDrafter("toy", runner, vocab_size=VOCAB, max_tokens=100)
    builder = ShapeBuilder(SHAPES["1,1,1"])
    for number, num_requests in enumerate((3, 3, 4), 1):
        asked = [growth(n, [n, number]) for n in range(num_requests)]
        builder.grow(asked, [drafter])
        assert (captures.replays, copies) == (number, [1] * number)
    # 6 tokens of three new texts and 3 + 2 of four are one size, and so are three roots and four.
    assert captures.count == 2


def test_prompts_need_no_graphs_of_their_own() -> None:
    pair = Pair(toy_decoder(3, **SMALL))
    for key, length in enumerate((5, 9, 14)):
        pair.grow(SHAPES["one level"], lambda k=key, n=length: [growth(k, list(range(n)))])
        assert pair.drafters[0].num_fed == length
    steps = pair.runners[0]._device_steps
    assert steps is not None
    assert len(steps._level_graphs) == 1


def test_graphs_unused_for_longest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_MOST_LEVEL_GRAPHS", 2)
    pair = Pair(toy_decoder(3, **SMALL))
    steps, captures = pair.runners[0]._device_steps, pair.captures[0]
    assert steps is not None
    counts = []
    for num_requests in (1, 2, 1, 3, 1, 2):  # of 1, 2 and 4 rows
        pair.grow(
            SHAPES["one level"], lambda num=num_requests: [growth(n, [n]) for n in range(num)]
        )
        counts.append(captures.count)
        assert len(steps._level_graphs) <= 2
    assert counts == [1, 2, 2, 3, 3, 4]  # the second gave way to the third, and comes back


def test_what_cannot_come_is_left_out_with_all_below() -> None:
    pair = Pair(toy_decoder(3, **SMALL, head=3.0))
    cold = SamplingParams(temperature=0.05)
    shape = TreeShape.of_widths((4, 3, 2))
    texts = ([1, 2, 3], [7, 8], [5])
    grown = pair.grow(shape, lambda: [growth(n, [*t], params=cold) for n, t in enumerate(texts)])
    assert any(3 < len(each.tree) < 1 + shape.count(3) for each in grown[0])
    for ours, theirs in zip(*grown, strict=True):
        (draft, _), (other, _) = ours.parts[0], theirs.parts[0]
        states = [d._states[draft.key] for d in pair.drafters]
        assert list(states[0].keys) == list(states[1].keys)
        path = draft.tree.path(len(draft.tree) - 1)
        pair.drafters[0].admit([(draft, path)])
        pair.drafters[1].admit([(other, path)])
        stop = states[0].num_computed
        assert stop == states[1].num_computed
        kept = [keys_and_values(r, draft.pages, stop) for r in pair.runners]
        torch.testing.assert_close(*kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"draw": "iid"},
        {"noise": SeededNoise(1, 0, VOCAB)},
        {"params": SamplingParams(temperature=0.8, top_k=3)},
        {"history": "penalised"},
    ],
    ids=["drawn", "seeded", "filtered", "penalised"],
)
def test_what_asks_for_more_grows_level_by_level(changes: dict[str, Any]) -> None:
    if "history" in changes:
        params = SamplingParams(repetition_penalty=2.0)
        changes = {"history": History(params, num_prompt=2, vocab_size=VOCAB)}
    pair = Pair(toy_decoder(3, **SMALL))
    pair.grow(SHAPES["2,1,1"], lambda: [growth(0, [1, 2]), growth(1, [3, 4, 5], **changes)])
    assert pair.captures[0].replays == 3


@pytest.mark.parametrize("limit", ["LADDER", "_PARTIAL_ROWS", "_SPARE_NUMBERS", "max_tokens"])
def test_what_fits_no_graph_grows_level_by_level(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    if limit != "max_tokens":
        small = {"LADDER": (0, 1), "_PARTIAL_ROWS": 2, "_SPARE_NUMBERS": 0}[limit]
        monkeypatch.setattr(graph, limit, small)
        monkeypatch.setattr("specinfer.ops.triton_attention.SPLIT_KEYS", 4)
    pair = Pair(toy_decoder(3, **SMALL))
    if limit == "max_tokens":
        for drafter in pair.drafters:
            drafter._max_tokens = 1
    pair.grow(SHAPES["2,1,1"], lambda: [growth(0, [1, 2, 3, 4, 5, 6])])
    steps = pair.runners[0]._device_steps
    assert steps is not None
    assert not steps._level_graphs


def test_levels_count_as_passes() -> None:
    pair, stats = Pair(toy_decoder(3, **SMALL)), EngineStats()
    drafter = TimedDrafter(pair.drafters[0], 0, stats)
    asked = [growth(0, [1, 2, 3]), growth(1, [4, 5], max_depth=2)]
    ShapeBuilder(SHAPES["2,1,1"]).grow(asked, [drafter])
    counts = [(one.num_nodes, one.num_spans, one.num_tokens) for one in stats.passes]
    assert counts == [(2, 2, 5), (4, 2, 4), (2, 1, 2)]
    assert sum(one.seconds for one in stats.passes) == pytest.approx(stats.seconds["draft"], 0.5)


def test_what_was_fed_before_too_many_levels_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_SPARE_NUMBERS", 0)
    pair, stats = Pair(toy_decoder(3, **SMALL)), EngineStats()
    drafter = TimedDrafter(pair.drafters[0], 0, stats)
    ShapeBuilder(SHAPES["1,1,1"]).grow([growth(0, [*range(9)]), growth(1, [4, 5])], [drafter])
    counts = [(one.num_nodes, one.num_spans, one.num_tokens) for one in stats.passes]
    assert counts == [(2, 2, 11), (2, 2, 2), (2, 2, 2)]
    assert sum(one.seconds for one in stats.passes) >= 0.99 * stats.seconds["draft"]


def test_a_failure_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(levels: Any, vocab_size: int) -> None:
        raise RuntimeError("out of luck")

    pair, stats = Pair(toy_decoder(3, **SMALL)), EngineStats()
    monkeypatch.setattr(pair.runners[0], "run_levels", fail)
    drafter = TimedDrafter(pair.drafters[0], 0, stats)
    for _ in range(2):
        (grown,) = ShapeBuilder(SHAPES["1,1,1"]).grow([growth(0, [1, 2])], [drafter])
        assert len(grown.tree) == 1
    assert "out of luck" in stats.failed_drafters["toy"]
    assert not stats.passes
    with pytest.raises(DrafterFailedError):
        drafter.draft_levels(list[Planned]())


@pytest.mark.parametrize("tree", [pytest.param("1,1,1", marks=pytest.mark.slow), "2,1"])
def test_greedy_texts_are_plain_decodings(tree: str) -> None:
    prompts, params = ([1, 2, 3], [4, 5], [6]), SamplingParams(temperature=0, max_tokens=10)
    texts = []
    captures = Captures()
    target = toy_decoder(0, **SMALL).to(DEVICE)
    near_target = toy_decoder(0, **SMALL, head=0.15)
    for is_plain in (True, False):
        runner = device_runner(near_target, captures)
        drafter = ModelDrafter("toy", runner, vocab_size=VOCAB, max_tokens=100)
        engine = toy_engine(
            target,
            [drafter],
            num_blocks=NUM_SLOTS // 4,
            speculation=Speculation(tree="off" if is_plain else tree),
        )
        sequences = [engine.add(str(n), p, params)[0] for n, p in enumerate(prompts)]
        finish(engine)
        texts.append(outputs_of(sequences))
        if is_plain:
            assert captures.replays == 0
        else:
            assert engine.stats.sums.num_accepted > 0
            assert captures.replays <= engine.stats.num_steps + 1  # a prompt of three tokens
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_a_graph_of_levels_equals_level_by_level() -> None:
    decoder = toy_decoder(3).to("cuda")
    trees = []
    for has_levels in (True, False):
        runner = Runner(deepcopy(decoder), NUM_SLOTS)
        drafter = ModelDrafter("toy", runner, vocab_size=VOCAB, max_tokens=100)
        assert drafter.has_levels
        drafter.has_levels = has_levels
        own = list[TokenTree]()
        for number in range(3):  # captured once, replayed twice
            texts = ([1, 2, 3, number], [4, number])
            asked = [growth(n + 2 * (number % 2), text) for n, text in enumerate(texts)]
            for shape in SHAPES.values():
                own += [each.tree for each in ShapeBuilder(shape).grow(asked, [drafter])]
        trees.append([(tree.tokens, tree.parents, tree.slots) for tree in own])
    assert trees[0] == trees[1]
