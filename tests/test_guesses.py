"""The pool of guesses: our kernels against numpy, number by number."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specinfer.draft import calibration as calibration_module
from specinfer.draft import growth as growth_module
from specinfer.draft import rounds as rounds_module
from specinfer.draft.calibration import Calibration, Curves, Fortune
from specinfer.draft.growth import Guesses, likeliest
from specinfer.draft.guesses import Guess, Limits, NativePool, NumpyPool
from specinfer.draft.rounds import Values
from specinfer.logits import RowFilters, target_laws
from specinfer.ops.native import kernels
from specinfer.request import SamplingParams

pytestmark = pytest.mark.skipif(kernels() is None, reason="no kernels of our own here")

DRAFTERS = (SimpleNamespace(name="a model"), SimpleNamespace(name="ngram"))


def growths(rng: np.random.Generator, count: int) -> list[SimpleNamespace]:
    """As much of requests as pools look at: their regimes, and how their drafts fare."""
    found = []
    for _ in range(count):
        fortune = Fortune()
        for _ in range(5):
            fortune.observe(0.5, float(rng.random() < 0.7))
        found.append(
            SimpleNamespace(
                draw="pick",
                regime=rng.choice(["greedy", "seeded"]),
                odds=lambda source, odds=fortune.odds: odds if source == 0 else 1.0,
            )
        )
    return found


def limits(rng: np.random.Generator, count: int) -> list[Limits]:
    return [
        Limits(
            max_depth=int(rng.integers(1, 6)),
            max_nodes=int(rng.integers(1, 20)),
            max_rounds=int(rng.integers(1, 6)),
            rows=int(rng.integers(1, 5)),
            urgency=float(rng.choice([1.0, 1.0, 0.5, 3.0])),
        )
        for _ in range(count)
    ]


def close(a: list[Guess], b: list[Guess]) -> bool:
    return [each[:-2] for each in a] == [each[:-2] for each in b] and np.allclose(
        [each[-2:] for each in a], [each[-2:] for each in b], rtol=1e-12
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_pools_grow_alike(seed, is_calibrated):
    rng = np.random.default_rng(seed)
    values = Values(Calibration() if is_calibrated else None, DRAFTERS)
    num_requests = int(rng.integers(1, 5))
    requests, own = growths(rng, num_requests), limits(rng, num_requests)
    pools = NumpyPool(own, values), NativePool(own, values, kernels())
    price = None if seed % 3 == 0 else 0.01
    costs = np.cumsum(rng.random(60) * 0.05)
    for number in range(6):
        assert np.isclose(*(pool.price(np.diff(costs)) for pool in pools), rtol=1e-12)
        offers, others = (pool.frontier(number, price) for pool in pools)
        assert [each[:-1] for each in offers] == [each[:-1] for each in others]
        if not offers:
            break
        width = int(rng.integers(1, 9))
        laws = np.sort(rng.dirichlet(np.full(width + 3, 0.3), len(offers)).astype(np.float32))
        laws = laws[:, ::-1][:, :width] * (rng.random((len(offers), width)) < 0.9)
        laws = np.sort(laws)[:, ::-1]  # zeros, which nothing may be drawn from, last
        tokens = rng.integers(0, 50, (len(offers), width))
        rows = [offer.row for offer in offers]
        for pool in pools:
            if number == 2:  # as several drafters' guesses come
                new = [
                    Guess(0, o.row, o.request, 7, o.depth + 1, 1, 0, 0, o.value / 2, 0.5)
                    for o in offers[1:]
                ]
                pool.append(rows, new)
            else:
                pool.extend(0, [requests[o.request] for o in offers], rows, tokens, laws)
    assert close(*(pool.best(costs) for pool in pools))
    assert close(*(pool.best(None) for pool in pools))


@pytest.mark.parametrize("seed", range(20))
def test_passes_are_weighed_alike(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    values = Values(Calibration() if seed % 4 else None, DRAFTERS)
    asked = growths(rng, int(rng.integers(1, 12)))
    reaches = rng.random(len(asked)).tolist()
    costs = np.cumsum(rng.random(8) * 0.2)
    native = list(values.worth_asking(0, asked, reaches, 0.05, costs))
    monkeypatch.setattr(rounds_module, "kernels", lambda: None)
    assert native == values.worth_asking(0, asked, reaches, 0.05, costs)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 4096, 5000])
@pytest.mark.parametrize("count", [1, 2, 8, 24])
def test_the_likeliest_are_found(size, count, monkeypatch):
    laws = torch.softmax(torch.randn(3, size, generator=torch.Generator().manual_seed(size)), -1)
    tokens, probabilities = likeliest(laws, count)
    monkeypatch.setattr(growth_module, "kernels", lambda: None)
    others = likeliest(laws, count)
    assert (tokens == others[0]).all()
    assert (probabilities == others[1]).all()


def test_the_first_among_equals_is_the_likeliest():
    laws = torch.full((1, 200), 1 / 200)
    assert likeliest(laws, 3)[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("size", [3, 100, 4096])
def test_logits_give_the_probabilities_of_their_law(temperature, size):
    logits = 5 * torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    logits[1, 0] = -1e30  # a token that the drafter does not know
    filters = RowFilters.of([(SamplingParams(temperature=temperature), 4)])
    laws = target_laws(logits, filters)
    tokens, probabilities = Guesses(logits=(logits, filters)).likeliest(8)
    assert (tokens == laws.topk(min(8, size), -1).indices.numpy()).all()
    expected = np.take_along_axis(laws.numpy(), tokens, -1)
    assert probabilities == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("changed", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_filters_are_not_passed_by(changed):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    filters = RowFilters.of([(SamplingParams(temperature=1.0, **changed), 1)])
    expected = likeliest(target_laws(logits, filters), 8)[1]
    assert (Guesses(logits=(logits, filters)).likeliest(8)[1] == expected).all()


def test_curves_learn_alike(monkeypatch):
    rng = np.random.default_rng(0)
    native, plain = Curves(), Curves()
    seen = [
        (int(rng.integers(0, 12)), float(rng.random() ** 3), float(rng.random() < 0.5))
        for _ in range(3000)
    ]
    seen += [(0, 0.9, 1.0)] * 9000  # until old ones fade
    for each in seen:
        native.record(*each)
    monkeypatch.setattr(calibration_module, "kernels", lambda: None)
    for each in seen:
        plain.record(*each)
    assert native.rates == pytest.approx(plain.rates, rel=1e-12)
    assert native.trials == pytest.approx(plain.trials, rel=1e-12)
    assert native.hits == pytest.approx(plain.hits, rel=1e-12)
