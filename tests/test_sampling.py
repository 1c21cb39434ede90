"""Logits become the law asked for, to the bit; tokens follow the law they claim to follow."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specinfer import sampling
from specinfer.errors import LawError
from specinfer.history import Edits
from specinfer.request import SamplingParams
from specinfer.sampling import (
    NO_PICK,
    RowFilters,
    SeededNoise,
    coin,
    draw,
    draw_rows,
    draw_without_replacement,
    greedy_picks,
    gumbel_noise,
    request_generator,
    seeded_pick,
    target_laws,
)
from specinfer.tree import TokenTree
from specinfer.verify import follow
from tests.helpers import children, top_k_tokens
from tests.oracle import ALMOST_ONE, Uniform, enumerate_chance, outcomes

FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(top_k=1),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, min_p=0.1),
    SamplingParams(top_k=3),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=0.8, min_p=0.02, top_k=20, top_p=0.95),
    SamplingParams(temperature=3.0, top_p=0.999),
    SamplingParams(min_p=1.0),
    SamplingParams(top_p=1e-9),
]


def reference(scores: Any, params: SamplingParams, banned: tuple[int, ...] = ()) -> Any:
    """One row's law in plain float64 numpy, filter by filter, with a full sort."""
    scores = scores.astype(np.float64)
    scores[list(banned)] = -np.inf
    if params.is_greedy:
        return np.eye(len(scores))[scores.argmax()]
    law = np.exp((scores - scores.max()) / params.temperature)
    law[law < params.min_p * law.max() * (1 - 1e-6)] = 0
    if 0 < params.top_k < len(law):
        law[law < np.sort(law)[-params.top_k]] = 0
    law /= law.sum()
    if params.top_p < 1:
        ordered = np.sort(law)[::-1]
        last = int((ordered.cumsum() < params.top_p).sum())
        law[law < ordered[min(last, len(law) - 1)]] = 0
    return law / law.sum()


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# --- the target's law -----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 100, 1000])
@pytest.mark.parametrize("params", FILTERS)
def test_filters_match_a_plain_reference(params: SamplingParams, vocab: int) -> None:
    logits = random_logits(6, vocab)
    p = target_laws(logits, RowFilters.of([(params, 6)])).numpy()
    assert p.dtype == np.float32
    for row, scores in zip(p, logits.numpy(), strict=True):
        np.testing.assert_allclose(row, reference(scores, params), atol=2e-6)


def test_filters_match_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(8, 300)
    ids = torch.zeros(8, 1, dtype=torch.long)
    processors = {
        "temperature": transformers.TemperatureLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
    }
    for asked in (
        {"temperature": 0.7},
        {"min_p": 0.05},
        {"top_k": 12},
        {"top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.01, "top_k": 40, "top_p": 0.85},
    ):
        scores = logits
        for name, value in asked.items():
            scores = processors[name](value)(ids, scores)
        p = target_laws(logits, RowFilters.of([(SamplingParams(**asked), 8)]))
        torch.testing.assert_close(p, torch.softmax(scores, -1), atol=1e-6, rtol=1e-5)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 1000, 70_000])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab: int, device: str) -> None:
    runs = [(params, 2) for params in FILTERS]
    logits = random_logits(2 * len(runs), vocab, scale=2.0).to(device)
    together = target_laws(logits, RowFilters.of(runs, device=device))
    for index, params in enumerate(FILTERS):
        for row in (2 * index, 2 * index + 1):
            filters = RowFilters.of([(params, 1)], device=device)
            assert torch.equal(together[row : row + 1], target_laws(logits[row : row + 1], filters))


def test_ties_at_a_cut_stay_together_and_greedy_takes_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    third = [0, 1 / 3, 1 / 3, 1 / 3, 0]
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.4)):
        p = target_laws(logits, RowFilters.of([(params, 1)]))
        np.testing.assert_allclose(p[0].numpy(), third, rtol=1e-6)
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=1)):
        filters = RowFilters.of([(params, 1)])
        assert target_laws(logits, filters)[0].tolist() == [0, 1, 0, 0, 0]
        assert greedy_picks(logits, filters).tolist() == [1]


def test_edits_reach_their_rows_alone() -> None:
    logits = random_logits(4, 6)
    before = logits.clone()
    runs = [(SamplingParams(temperature=0), 2), (SamplingParams(top_k=2), 2)]
    best = logits.argmax(-1).tolist()
    edits = [
        Edits(banned={0: frozenset({best[0], 3})}),
        Edits(banned={0: frozenset({best[2]})}),
    ]
    filters = RowFilters.of(runs, edits=edits)
    p = target_laws(logits, filters)
    assert p[0, best[0]] == p[0, 3] == p[2, best[2]] == 0
    assert p[1, best[1]] == 1
    assert p[3, best[3]] > 0
    assert greedy_picks(logits, filters)[0] == p[0].argmax()
    assert torch.equal(logits, before), "logits are left as they are"


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_cold_rows_are_laws(temperature: float) -> None:
    logits = random_logits(3, 50, scale=100.0)
    p = target_laws(logits, RowFilters.of([(SamplingParams(temperature=temperature), 3)]))
    assert torch.equal(p.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(p.sum(-1), torch.ones(3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(FILTERS) - 1), min_size=1, max_size=5), st.integers(0, 99))
def test_any_mix_of_requests_gives_each_its_own_law(kinds: list[int], seed: int) -> None:
    runs = [(FILTERS[kind], 1 + kind % 3) for kind in kinds]
    params = [each for each, count in runs for _ in range(count)]
    logits = random_logits(len(params), 200, seed).bfloat16()
    p = target_laws(logits, RowFilters.of(runs)).numpy()
    for row, scores, each in zip(p, logits.float().numpy(), params, strict=True):
        assert abs(row.sum() - 1) < 1e-5
        if each.top_p == 1:  # bf16 ties make the reference's own cut a matter of rounding
            np.testing.assert_allclose(row, reference(scores, each), atol=2e-6)


# --- seeded requests ------------------------------------------------------------------------------


def g_statistic(counts: Any, law: Any) -> float:
    """2 Σ counts · log(counts / expected): chi-squared with support - 1 degrees of freedom."""
    expected = law * counts.sum()
    assert (counts[expected == 0] == 0).all()
    seen = counts > 0
    return float(2 * (counts[seen] * np.log(counts[seen] / expected[seen])).sum())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_have_no_pick(value: float) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1)
    logits[1, 0 if value > 0 or math.isnan(value) else slice(None)] = value
    greedy = RowFilters.of([(SamplingParams(temperature=0.0), 3)])
    assert greedy_picks(logits, greedy).tolist() == [1, NO_PICK, 1]
    drawn = SamplingParams(temperature=0.7, top_k=2, top_p=0.9, min_p=0.01)
    p = target_laws(logits, RowFilters.of([(drawn, 3)]))
    assert p.isnan().any(-1).tolist() == p.isnan().all(-1).tolist() == [False, True, False]
    assert seeded_pick(p, torch.zeros(3, 3)).tolist() == [1, NO_PICK, 1]


def test_seeded_picks_follow_the_law() -> None:
    law = np.array([0.4, 0.0, 0.3, 0.2, 0.06, 0.03, 0.01])
    noise = np.stack([gumbel_noise(7, 0, position, 7) for position in range(40_000)])
    p = torch.from_numpy(law).float().expand(len(noise), -1)
    picks = seeded_pick(p, torch.from_numpy(noise))
    counts = np.bincount(picks.numpy(), minlength=7)
    assert g_statistic(counts, law) < 20.5  # chi-squared, 5 degrees of freedom: p = 0.001


def test_gumbel_noise_is_standard_and_depends_on_its_key_alone() -> None:
    noise = gumbel_noise(3, 1, 5, 100_000)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):  # the distribution is exp(-exp(-x))
        below = float((noise < -math.log(-math.log(quantile))).mean())
        assert abs(below - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / 1e5)
    assert np.array_equal(noise, gumbel_noise(3, 1, 5, 100_000))
    assert np.array_equal(noise[:10], gumbel_noise(3, 1, 5, 10))
    for key in ((4, 1, 5), (3, 2, 5), (3, 1, 6)):
        assert abs(np.corrcoef(noise, gumbel_noise(*key, 100_000))[0, 1]) < 0.02
    assert np.array_equal(gumbel_noise(2**64 + 3, 1, 5, 4), noise[:4])


def test_seeded_noise_keeps_what_it_is_told_to() -> None:
    noise = SeededNoise(seed=3, sample=0, vocab=8)
    rows = [noise.row(position) for position in range(4)]
    assert np.array_equal(rows[2], gumbel_noise(3, 0, 2, 8))
    assert noise.row(2) is rows[2]
    noise.forget(before=3)
    assert noise.row(3) is rows[3]
    assert noise.row(2) is not rows[2]


@given(st.integers(0, 10_000))
def test_seeded_text_is_the_same_with_any_tree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = SeededNoise(seed, 0, 3)

    def pick(text: tuple[int, ...]) -> int:
        law = torch.from_numpy(np.random.default_rng([seed, *text]).dirichlet([1.0] * 3))
        return int(seeded_pick(law, torch.from_numpy(noise.row(len(text)))))

    plain: tuple[int, ...] = ()
    while len(plain) < 6:
        plain = (*plain, pick(plain))
    tree = TokenTree(0)
    for _ in range(8):
        tree.add(int(rng.integers(len(tree))), int(rng.integers(3)))
    texts = [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]
    verdict = follow(tree, [pick(text) for text in texts])
    emitted = [*(tree.tokens[node] for node in verdict.path), verdict.next_token]
    assert tuple(emitted) == pick_continued(plain, len(emitted), pick)


def pick_continued(text: tuple[int, ...], length: int, pick: Any) -> tuple[int, ...]:
    """A text cut or continued to a length."""
    while len(text) < length:
        text = (*text, pick(text))
    return text[:length]


# --- unseeded requests ----------------------------------------------------------------------------


def test_a_request_has_its_own_generator() -> None:
    assert request_generator(0, 5).random() == request_generator(0, 5).random()
    draws = {request_generator(seed, number).random() for seed in range(3) for number in range(3)}
    assert len(draws) == 9


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("vocab", [7, 256, 257, 1000])
def test_no_draw_returns_a_token_without_mass(u: float, vocab: int) -> None:
    rng: Any = Uniform(u)
    for token in {0, vocab // 2, vocab - 1}:
        law = np.zeros(vocab, np.float32)
        law[token] = 0.9999999
        assert draw(law, rng) == token
        law[(token + 3) % vocab] = 1e-30
        assert law[draw(law, rng)] > 0
    with pytest.raises(LawError, match="without mass"):
        draw(np.zeros(vocab, np.float32), rng)


@pytest.mark.parametrize("vocab", [6, 600])
def test_draws_follow_the_law(vocab: int) -> None:
    rng = np.random.default_rng(0)
    law = rng.dirichlet([0.5] * vocab)
    law[::3] = 0
    law /= law.sum()
    counts = np.zeros(vocab)
    for _ in range(20_000):
        counts[draw(law, rng)] += 1
    bulk = law > 5 / 20_000  # pool what is too rare for the asymptotic law
    pooled = np.append(counts[bulk], counts[~bulk].sum())
    expected = np.append(law[bulk], law[~bulk].sum())
    if expected[-1] == 0:
        pooled, expected = pooled[:-1], expected[:-1]
    degrees = int((expected > 0).sum()) - 1
    assert g_statistic(pooled, expected) < degrees + 3.3 * math.sqrt(2 * degrees) + 4


def test_coins_are_certain_at_the_ends() -> None:
    rng = np.random.default_rng(0)
    assert all(coin(1.0, rng) for _ in range(100))
    assert not any(coin(0.0, rng) for _ in range(100))
    assert abs(sum(coin(0.3, rng) for _ in range(10_000)) - 3000) < 4 * 46


class Given:
    """Stands in for a generator: returns the numbers it is given, one after the other."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = iter(np.ravel(numbers).tolist())

    def random(self, shape: tuple[int, int] | None = None) -> Any:
        if shape is None:
            return next(self.numbers)
        return np.array([[next(self.numbers) for _ in range(shape[1])] for _ in range(shape[0])])


@pytest.mark.parametrize("vocab", [300, 512, 4097])
def test_rows_are_drawn_as_one_row_is(vocab: int) -> None:
    """The same numbers give the same tokens; zeros stay out, at both ends of the numbers too."""
    rng = np.random.default_rng(vocab)
    laws = (rng.random((40, vocab)) * (rng.random((40, vocab)) < 0.1)).astype(np.float32)
    numbers = rng.random((40, 2))
    numbers[:3] = [[0, 0], [ALMOST_ONE, 0], [ALMOST_ONE, ALMOST_ONE]]
    rngs = [(Given(numbers[:15]), 15), (Given(numbers[15:]), 25)]
    tokens, sums = draw_rows(torch.from_numpy(laws), rngs)  # type: ignore[arg-type]
    for law, token, own in zip(laws[3:], tokens[3:].tolist(), numbers[3:], strict=True):
        assert token == draw(law, Given(own))  # type: ignore[arg-type]
    assert (laws[np.arange(40), tokens] > 0).all()
    np.testing.assert_allclose(sums, laws.sum(-1, dtype=np.float64), rtol=1e-6)


def test_rows_that_are_no_law_have_the_sum_that_says_so() -> None:
    rows = torch.zeros(3, 700)
    rows[1] = torch.nan
    rows[2, 699] = 1.0
    tokens, sums = draw_rows(rows, [(np.random.default_rng(0), 3)])
    assert ((tokens >= 0) & (tokens < 768)).all()
    assert tokens[2] == 699
    assert sums[0] == 0
    assert sums[1].isnan()


def test_drawing_without_replacement_follows_the_sequential_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enumerate_chance(monkeypatch)
    q = np.array([0.5, 0.3, 0.0, 0.2])
    got = {
        tuple(tokens): probability
        for probability, tokens in outcomes(lambda rng: draw_without_replacement(q, 2, rng))
    }
    for one, two in itertools.permutations([0, 1, 3], 2):
        assert got.pop((one, two)) == pytest.approx(q[one] * q[two] / (1 - q[one]))
    assert not got


def test_drawing_without_replacement_stops_when_nothing_is_left() -> None:
    rng = np.random.default_rng(0)
    q = np.array([0.5, 0.0, 0.4999999, 0.0], np.float32)
    for _ in range(20):
        assert sorted(draw_without_replacement(q, 9, rng)) == [0, 2]
        assert draw_without_replacement(q, 9, rng, seen=(0,)) == [2]
    assert draw_without_replacement(q, 9, rng, seen=(0, 2)) == []
    assert q.tolist() == [0.5, 0.0, np.float32(0.4999999), 0.0]


# --- growing a tree -------------------------------------------------------------------------------


def test_slots_record_the_law_they_were_drawn_from() -> None:
    rng = np.random.default_rng(1)
    rows = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]], np.float32)
    tree = TokenTree(0)
    nodes = sampling.add_iid(tree, 0, rows, 1, 6, rng, source=2)
    assert len(tree.slots) == 6
    assert nodes == children(tree, 0)
    assert all(slot.law is not None and slot.law.seen == () for slot in tree.slots)
    assert {slot.source for slot in tree.slots} == {2}

    tree = TokenTree(0)
    nodes = sampling.add_without_replacement(tree, 0, rows, 1, 6, rng)
    tokens = [tree.tokens[node] for node in nodes]
    assert sorted(tokens) == [0, 1]
    laws = [slot.law for slot in tree.slots]
    assert [law.seen for law in laws if law] == [(), (tokens[0],)]

    tree = TokenTree(0)
    (picked,) = sampling.add_picks(tree, 0, top_k_tokens(rows[1], 1), source=1)
    assert tree.tokens[picked] == 0
    assert tree.slots[0].law is not None
    assert tree.slots[0].law.is_pick
    (drawn,) = sampling.add_without_replacement(tree, 0, rows, 1, 2, rng, seen=(0,))
    assert tree.tokens[drawn] == 1
