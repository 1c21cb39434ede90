"""Learnt acceptance: tables count what was seen, come to the truth, and learn between steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specinfer.config import Speculation
from specinfer.draft.calibration import (
    _MAX_TRIALS,
    _NUM_KNOTS,
    NUM_PLACES,
    NUM_RANKS,
    REGIMES,
    Calibration,
    Curves,
    Features,
    Fortune,
    knots_of,
    regime_of,
)
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.rounds import Values
from specinfer.engine.engine import Engine
from specinfer.engine.speculator import Speculator
from specinfer.errors import ConfigError
from specinfer.request import SamplingParams
from tests.engines import finish, model_drafter, toy_decoder, toy_engine


def probability_at(knot: float) -> float:
    return float(1 / (1 + np.exp(8 - knot / 2)))


def test_a_new_table_takes_drafters_at_their_word() -> None:
    curves = Curves()
    for knot in range(_NUM_KNOTS):
        probability = probability_at(knot)
        assert curves.at(3, probability) == pytest.approx(probability, abs=1e-12)
    for probability in np.linspace(0.001, 0.999, 97):
        assert curves.at(0, float(probability)) == pytest.approx(probability, abs=0.01)


def test_between_knots_rates_are_linear_in_log_odds() -> None:
    curves, rng = Curves(), np.random.default_rng(0)
    curves.reset(curves.trials, curves.trials * rng.uniform(0, 1, curves.hits.shape))
    for knot in (0.25, 7.5, 15.9, 31.5):
        low, share = int(knot), knot % 1
        expected = (1 - share) * curves.rates[2, low] + share * curves.rates[2, low + 1]
        assert curves.at(2, probability_at(knot)) == pytest.approx(expected, abs=1e-9)
    for probability, knot in ((0.0, 0), (1e-30, 0), (1.0, _NUM_KNOTS - 1)):
        assert curves.at(2, probability) == pytest.approx(curves.rates[2, knot])
        assert knots_of(probability) == knot


def test_one_and_many_are_the_same() -> None:
    rng = np.random.default_rng(1)
    curves = Curves()
    for _ in range(200):
        curves.record(int(rng.integers(0, 12)), rng.random(), rng.random())
    ranks = rng.integers(0, 12, (5, 7))
    probabilities = np.concatenate((rng.random(33), [0.0, 1.0])).reshape(5, 7)
    many = curves.along(ranks, probabilities)
    one = [
        [curves.at(int(r), float(p)) for r, p in zip(*row, strict=True)]
        for row in zip(ranks, probabilities, strict=True)
    ]
    np.testing.assert_allclose(many, one, rtol=1e-12)
    wide = curves.along(np.arange(3), probabilities[:, :1])
    assert wide.shape == (5, 3)
    assert wide[4, 2] == pytest.approx(curves.at(2, float(probabilities[4, 0])))


def test_a_slot_is_shared_between_its_two_knots() -> None:
    curves = Curves()
    trials, hits = curves.trials.copy(), curves.hits.copy()
    curves.record(1, probability_at(10.25), 0.5)
    trials[1, 10:12] += 0.75, 0.25
    hits[1, 10:12] += 0.375, 0.125
    np.testing.assert_allclose(curves.trials, trials, atol=1e-9)
    np.testing.assert_allclose(curves.hits, hits, atol=1e-9)
    np.testing.assert_allclose(curves.rates, hits / trials, atol=1e-12)  # not those of before
    curves.record(NUM_RANKS + 5, 0.5, 1.0)  # late slots count as the last
    assert curves.trials[NUM_RANKS - 1, 16] == trials[NUM_RANKS - 1, 16] + 1


def test_old_slots_fade() -> None:
    curves = Curves()
    probability = probability_at(16)
    for accepted, expected in ((1.0, 1.0), (0.0, 0.05)):  # a drafter that is never right any more
        for _ in range(3 * int(_MAX_TRIALS)):
            curves.record(0, probability, accepted)
        assert curves.trials[0].max() <= _MAX_TRIALS + 1
        assert curves.at(0, probability) == pytest.approx(expected, abs=0.15)


def test_first_slots_are_shares_and_rates() -> None:
    curves = Curves()
    for _ in range(5000):
        curves.record(0, probability_at(20), 1.0)
        curves.record(1, probability_at(4), 1.0)
    shares, rates = curves.first_slots
    assert shares.sum() == pytest.approx(1.0)
    assert shares.argmax() == 20
    np.testing.assert_array_equal(rates, curves.rates[0])


class Named:
    name = "model"


def test_gains_expect_what_first_slots_have_been_worth() -> None:
    calibration = Calibration()
    table = calibration.table("model", "hot")
    for knot in (10, 20):
        for _ in range(2000):
            table.after.record(0, probability_at(knot), float(knot == 20))
    values = Values(calibration, [Named()])  # type: ignore[list-item]

    class Asking:
        draw, regime = "pick", "hot"

        def odds(self, source: int) -> float:
            return 1.0

    reaches = np.array([1.0, 0.5, 0.1])
    gains = values.gains(0, [Asking()] * 3, reaches, 0.2)  # type: ignore[list-item]
    shares, rates = table.after.first_slots
    expected = [sum(shares * np.maximum(0, reach * rates - 0.2)) for reach in reaches]
    np.testing.assert_allclose(gains, expected, rtol=1e-12)
    assert gains[0] > gains[1] > 0
    free = Values(None, [Named()])  # type: ignore[list-item]
    np.testing.assert_allclose(
        free.gains(0, [Asking()] * 3, reaches, 0.2),  # type: ignore[list-item]
        [0.8, 0.3, 0.0],
    )


def test_tables_come_to_the_true_rates() -> None:
    """A drafter that is right more often than it says, and draws whose largest is all one knows."""
    rng = np.random.default_rng(3)
    calibration = Calibration(bundled=False)
    for _ in range(30_000):
        before = rng.uniform(0.05, 0.95)
        after = before * rng.uniform(0.5, 1)
        rank = int(rng.integers(0, 3))
        hit = rng.random() < (after**0.5 if rank == 0 else after**2)
        calibration.record("model", "cold", Features(rank, before, after), float(hit), Fortune())
    after_curves = calibration.table("model", "cold").after
    for probability in (0.1, 0.3, 0.6, 0.9):
        assert after_curves.at(0, probability) == pytest.approx(probability**0.5, abs=0.05)
        assert after_curves.at(1, probability) == pytest.approx(probability**2, abs=0.05)
    before_curves = calibration.table("model", "cold").before
    assert before_curves.at(0, 0.6) == pytest.approx((0.6 * 0.75) ** 0.5, abs=0.06)
    fresh = Calibration(bundled=False).table("model", "hot").after.rates
    np.testing.assert_array_equal(calibration.table("model", "hot").after.rates, fresh)
    np.testing.assert_array_equal(calibration.table("ngram", "cold").after.rates, fresh)


def test_places_are_unconditional() -> None:
    """b_j: the j-th slot is examined and accepted, and all before it were rejected."""
    rng = np.random.default_rng(4)
    calibration = Calibration(bundled=False)
    given_reached = [0.6, 0.5, 0.2]
    for _ in range(20_000):
        for place, rate in enumerate(given_reached):
            hit = rng.random() < rate
            calibration.record_place("warm", place, float(hit))
            if hit:
                break
    calibration.record_place("warm", NUM_PLACES, 1.0)  # beyond what is counted
    places = calibration.places("warm")
    assert places.shape == (NUM_PLACES,)
    np.testing.assert_allclose(places[:3], [0.6, 0.4 * 0.5, 0.4 * 0.5 * 0.2], atol=0.02)
    assert places.sum() <= 1.0
    fresh = Calibration(bundled=False).places("warm")
    assert (fresh[:-1] >= fresh[1:]).all()


def test_regimes() -> None:
    assert regime_of(0.0, greedy=True, seeded=True) == "greedy"
    assert regime_of(1.0, greedy=False, seeded=True) == "seeded"
    names = [regime_of(t, greedy=False, seeded=False) for t in (0.05, 0.06, 0.45, 0.46, 0.8, 0.81)]
    assert names == ["greedy", "cold", "cold", "warm", "warm", "hot"]


# --- files ----------------------------------------------------------------------------------------


def taught(seed: int) -> Calibration:
    rng, calibration = np.random.default_rng(seed), Calibration()
    for _ in range(300):
        slot = Features(int(rng.integers(0, 9)), rng.random(), rng.random())
        name, regime = ("model", "ngram")[rng.integers(2)], REGIMES[rng.integers(5)]
        calibration.record(name, regime, slot, rng.random(), Fortune())
        calibration.record_place(regime, int(rng.integers(0, 5)), rng.random())
    return calibration


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file, one = tmp_path / "tables.json", taught(0)
    one.save(file)
    other = Calibration.load(file)
    assert [each.name for each in tmp_path.iterdir()] == ["tables.json"]
    for name in ("model", "ngram"):
        for regime in REGIMES:
            mine, theirs = one.table(name, regime), other.table(name, regime)
            np.testing.assert_allclose(mine.after.rates, theirs.after.rates, atol=1e-3)
            np.testing.assert_allclose(mine.before.rates, theirs.before.rates, atol=1e-3)
            np.testing.assert_allclose(one.places(regime), other.places(regime), atol=1e-3)
    other.record("model", "hot", Features(0, 0.5, 0.5), 1.0, Fortune())  # and goes on from there
    other.save(file)
    assert json.loads(file.read_text())["format"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: "[]",
        lambda content: "{",
        lambda content: json.dumps(content | {"format": 2}),
        lambda content: json.dumps({k: v for k, v in content.items() if k != "places"}),
        lambda content: json.dumps(content | {"places": {"tepid": content["places"]["hot"]}}),
        lambda content: json.dumps(content | {"places": {"hot": [[1.0], [0.5]]}}),
        lambda content: json.dumps(content | {"tables": [{"drafter": "model"}]}),
        lambda content: json.dumps(content).replace('"hits": [[', '"hits": [[-1.0, ', 1),
        lambda content: json.dumps(content).replace('"trials": [[', '"trials": [["x", ', 1),
        lambda content: json.dumps(content).replace('"hits"', '"hats"'),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "tables.json"
    taught(1).save(file)
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ConfigError, match=r"tables\.json"):
        Calibration.load(file)


@pytest.mark.parametrize(("field", "value"), [("trials", 0.0), ("hits", 1e9)])
def test_counts_that_make_no_rate_are_refused(tmp_path: Path, field: str, value: float) -> None:
    """No trials make 0 / 0, and more hits than trials a rate above 1."""
    file = tmp_path / "tables.json"
    taught(1).save(file)
    content = json.loads(file.read_text())
    content["tables"][0]["after"][field][0][3] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tables\.json"):
        Calibration.load(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")


# --- read before the step, taught after it --------------------------------------------------------


@pytest.mark.parametrize("tree", ["calibrated", "sequoia"])
def test_tables_learn_between_steps_alone(monkeypatch: pytest.MonkeyPatch, tree: str) -> None:
    """From the first tree of a step to the last verdict the tables stand still."""
    events: list[str] = []

    def noting(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(event)
            result = original(self, *args, **kwargs)
            events.append(f"/{event}")
            return result

        monkeypatch.setattr(owner, name, method)

    noting(Speculator, "draft", "draft")
    noting(Engine, "_commit", "commit")
    noting(HeapBuilder, "grow", "grow")
    noting(Calibration, "places", "read")
    noting(Calibration, "record", "learn")
    noting(Calibration, "record_place", "learn")
    for name in ("after", "after_one", "before_one", "gains"):
        noting(Values, name, "read")
    decoder = toy_decoder(1)
    engine = toy_engine(
        decoder,
        [model_drafter(toy_decoder(2), 64 * 4)],
        speculation=Speculation(tree=tree, max_nodes=8, max_depth=4),
    )
    engine.add("hot", [1, 2, 3], SamplingParams(max_tokens=8, n=2))
    engine.add("greedy", [4, 5], SamplingParams(max_tokens=8, temperature=0.0))
    finish(engine)
    inside: list[str] = []
    counts = dict.fromkeys(("read", "learn"), 0)
    for event in events:
        if event.startswith("/"):
            assert inside.pop() == event[1:]
            continue
        inside.append(event)
        if event == "read":
            assert "draft" in inside
            assert "commit" not in inside
        if event == "learn":
            assert inside[0] == "commit"
        counts[event] = counts.get(event, 0) + 1
    assert counts["read"] > 0
    assert counts["learn"] > 0


@pytest.mark.parametrize("offset", [-1.0, 0.0, 1.0])
def test_a_request_learns_how_its_own_drafts_fare(offset: float) -> None:
    """Its offset in log-odds, drawn towards none."""
    rng, fortune = np.random.default_rng(1), Fortune()
    seen = []
    for step in range(1200):
        logit = rng.normal(0, 1.5)
        expected = 1 / (1 + np.exp(-logit))
        fortune.observe(expected, float(rng.random() < 1 / (1 + np.exp(-logit - offset))))
        seen += [np.log(fortune.odds)] if step > 200 else []
    assert np.mean(seen) == pytest.approx(0.7 * offset, abs=0.25)
    assert Fortune().odds == 1.0


def test_values_take_a_requests_fortune_into_account() -> None:
    values = Values(Calibration(), [Named()])  # type: ignore[list-item]

    class Asking:
        draw, regime = "pick", "hot"

        def __init__(self, odds: float) -> None:
            self.own = odds

        def odds(self, source: int) -> float:
            return self.own

    plain, lucky = Asking(1.0), Asking(3.0)
    ranks, probabilities = np.array([[0, 1, 2]] * 2), np.array([[0.5, 0.3, 0.9]] * 2)
    rates, better = values.after(0, [plain, lucky], ranks, probabilities)  # type: ignore[list-item]
    np.testing.assert_allclose(better / (1 - better), 3 * rates / (1 - rates))
    for rank, probability, expected in zip(ranks[0], probabilities[0], better, strict=True):
        one = values.after_one(0, lucky, int(rank), float(probability))  # type: ignore[arg-type]
        assert one == pytest.approx(expected)
