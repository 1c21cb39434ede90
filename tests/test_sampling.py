"""Tokens follow the law they claim to follow; seeded ones depend on their place alone."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specinfer import sampling
from specinfer.errors import LawError
from specinfer.sampling import (
    SeededNoise,
    coin,
    draw,
    draw_rows,
    draw_without_replacement,
    gumbel_noise,
    request_generator,
    seeded_pick,
)
from specinfer.tree import TokenTree
from specinfer.verify import follow
from tests.helpers import children, top_k_tokens
from tests.oracle import ALMOST_ONE, Uniform, enumerate_chance, outcomes

# --- seeded requests ------------------------------------------------------------------------------


def g_statistic(counts: Any, law: Any) -> float:
    """2 Σ counts · log(counts / expected): chi-squared with support - 1 degrees of freedom."""
    expected = law * counts.sum()
    assert (counts[expected == 0] == 0).all()
    seen = counts > 0
    return float(2 * (counts[seen] * np.log(counts[seen] / expected[seen])).sum())


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
