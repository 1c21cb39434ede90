"""Logits become the law asked for, to the bit, whatever other rows stand beside them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specinfer.history import Edits
from specinfer.logits import NO_PICK, RowFilters, greedy_picks, target_laws
from specinfer.request import SamplingParams
from specinfer.sampling import seeded_pick

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


@settings(max_examples=60)
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
