"""A drafter that raises is dropped; the step goes on, exactly, and so do the other drafters."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer.config import EngineConfig, Speculation
from specinfer.draft.base import Draft, Drafter, Pick
from specinfer.draft.ngram import NgramDrafter
from specinfer.engine.engine import Engine
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from tests.engines import (
    far_away,
    finish,
    free_blocks,
    model_drafter,
    outputs_of,
    toy_decoder,
    toy_engine,
)

VOCAB = 24
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=1.0, seed=3, max_tokens=24),
    SamplingParams(temperature=0, max_tokens=24, speculation={"tree": "2,2,1"}),
]


class Failing:
    """A drafter that raises at its n-th call of one of its methods."""

    def __init__(self, drafter: Drafter, method: str, at: int) -> None:
        self.name, self.max_positions = "failing", drafter.max_positions
        self.num_calls = dict.fromkeys(("expand", "admit", "drop"), 0)
        self._drafter, self._method, self._at = drafter, method, at

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor | list[list[Pick]]:
        self._count("expand")
        return self._drafter.expand(frontier)

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        self._count("admit")
        self._drafter.admit(accepted)

    def drop(self, key: int) -> None:
        self._count("drop")
        self._drafter.drop(key)

    def _count(self, method: str) -> None:
        self.num_calls[method] += 1
        if method == self._method and self.num_calls[method] >= self._at:
            raise RuntimeError("out of luck")


@pytest.fixture(scope="module")
def target() -> Decoder:
    return toy_decoder(7, vocab_size=VOCAB, num_hidden_layers=2)


def engine_of(target: Decoder, drafters: Sequence[Any], tree: str = "2,2,1") -> Engine:
    return toy_engine(target, drafters, num_blocks=400, speculation=Speculation(tree=tree))


def run(engine: Engine) -> list[tuple[Any, ...]]:
    full = free_blocks(engine)
    sequences = [
        engine.add(str(number), prompt, params)[0]
        for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    finish(engine)
    assert free_blocks(engine) == full
    return outputs_of(sequences)


@pytest.mark.parametrize("tree", ["2,2,1", "calibrated", "best-first", "sequoia", "2x3"])
@pytest.mark.parametrize(("method", "at"), [("expand", 1), ("expand", 8), ("admit", 3)])
def test_text_is_that_of_plain_decoding(target: Decoder, method: str, at: int, tree: str) -> None:
    plain = run(plain_engine(target))
    failing = Failing(model_drafter(target, 1600), method, at)
    engine = engine_of(target, [failing], tree)
    assert run(engine) == plain
    assert failing.num_calls[method] == at, "it is asked no more"
    assert engine.stats.failed_drafters == {"failing": "RuntimeError('out of luck')"}


def plain_engine(target: Decoder) -> Engine:
    """With a drafter of no use, so that requests that ask for trees are taken."""
    return engine_of(target, [NgramDrafter()], "off")


def test_the_other_drafter_goes_on(target: Decoder) -> None:
    failing = Failing(toy_model(), "expand", 5)
    engine = engine_of(target, [failing, model_drafter(target, 1600)])
    assert run(engine) == run(plain_engine(target))
    before = engine.stats.sums.num_accepted
    assert run(engine) == run(plain_engine(target))
    assert engine.stats.sums.num_accepted > before
    assert failing.num_calls["expand"] == 5


def toy_model() -> Drafter:
    return model_drafter(toy_decoder(8, vocab_size=VOCAB, num_hidden_layers=1), 1600)


@pytest.mark.parametrize(("at", "num_drafts"), [(4, 1), (5, 2)])
def test_what_was_drawn_before_the_failure_is_verified(
    target: Decoder, at: int, num_drafts: int
) -> None:
    """A tree of three levels; then one that ends at its root, or behind its first level."""
    engine = engine_of(target, [Failing(model_drafter(target, 1600), "expand", at)])
    [sequence] = engine.add("0", PROMPTS[0], SamplingParams(max_tokens=24))
    finish(engine)
    assert sequence.num_output == 24
    assert sequence.stats.num_drafts == num_drafts


def test_a_drafter_that_fails_while_it_catches_up(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = model_drafter(target, 1600)
    monkeypatch.setattr(drafter, "feed", lambda draft, count: 1 / 0)
    config = EngineConfig(block_size=4, chunked_prefill_size=8)
    speculation = Speculation(tree="2,2,1")
    engine = toy_engine(target, [drafter], num_blocks=400, speculation=speculation, config=config)
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = [[1, 2, 3], [*range(1, 21)]]
    sequences = [engine.add(str(n), text, params)[0] for n, text in enumerate(texts)]
    finish(engine)
    assert [sequence.num_output for sequence in sequences] == [12, 12]
    assert list(engine.stats.failed_drafters) == [drafter.name]


class Odd:
    """A drafter of which each call's last row is no law."""

    name, max_positions = "odd", 1 << 30

    def __init__(self, value: float, place: int | slice) -> None:
        self._value, self._place, self._num_calls = value, place, 0

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor:
        self._num_calls += 1
        generator = torch.Generator().manual_seed(self._num_calls)
        rows = torch.randn(sum(len(nodes) for _, nodes in frontier), VOCAB, generator=generator)
        rows[-1, self._place] = self._value
        return rows

    def admit(self, accepted: Any) -> None: ...

    def drop(self, key: int) -> None: ...


@pytest.mark.parametrize("tree", ["2,2,1", "calibrated", "best-first", "sequoia", "2x3"])
@pytest.mark.parametrize(
    ("value", "place"), [(math.nan, slice(None)), (math.inf, 3), (-math.inf, slice(None))]
)
def test_rows_that_are_no_law_propose_nothing(
    target: Decoder, tree: str, value: float, place: int | slice
) -> None:
    """Picked, drawn, and drawn far away, where laws are cut; the other rows do propose."""
    params = [*PARAMS, SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, top_p=0.9)]
    for is_far in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if is_far:
                far_away(patch, support=5)
            engine = engine_of(target, [Odd(value, place)], tree)
            sequences = [engine.add(str(n), [n + 1], each)[0] for n, each in enumerate(params)]
            finish(engine)
        assert [sequence.num_output for sequence in sequences] == [24] * len(params)
        assert outputs_of(sequences[:2]) == outputs_of(
            finished(plain_engine(target), [[1], [2]], params[:2])
        )
        assert engine.stats.sums.num_drafted > 0
        assert not engine.stats.failed_drafters


def finished(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    sequences = [engine.add(str(p), p, each)[0] for p, each in zip(prompts, params, strict=True)]
    finish(engine)
    return sequences


def test_the_log_says_so_once(target: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(target, [Failing(model_drafter(target, 1600), "drop", 1)])
    with caplog.at_level(logging.ERROR, "specinfer"):
        run(engine)
    assert [record.message for record in caplog.records] == [
        "drafter failing failed and is dropped: serving goes on without it"
    ]
