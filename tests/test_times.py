"""What a step costs, as numbers: tables, hulls, and corrections by what steps take."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.engine.times import StepTimes

SIZES = [1, 2, 4, 6, 7, 8, 16, 32, 64]
SECONDS = [1.0, 1.01, 1.02, 1.03, 1.2, 1.25, 1.6, 2.5, 4.4]


@st.composite
def measured(draw: st.DrawFn) -> StepTimes:
    """Anything that may have been measured."""
    sizes = sorted(draw(st.sets(st.integers(1, 600), min_size=1, max_size=12)))
    times = st.floats(1e-5, 10.0)
    seconds = draw(st.lists(times, min_size=len(sizes), max_size=len(sizes)))
    return StepTimes(sizes, seconds, draw(st.floats(0.0, 0.1)))


def follow(times: StepTimes, factor: float, sizes: list[int], rounds: int, spans: int = 1) -> None:
    """Steps that take `factor` times what was measured."""
    truth = StepTimes.from_json(times.to_json())
    for _ in range(rounds):
        for size in sizes:
            times.observe(size, factor * truth.seconds(size, spans), spans)


# --- tables and hulls -----------------------------------------------------------------------------


def test_a_table_is_what_was_measured_and_linear_between() -> None:
    times = StepTimes(SIZES, SECONDS)
    table = times.table(128)
    assert table[0] == 0.0
    assert table[SIZES] == pytest.approx(SECONDS)
    assert table[12] == pytest.approx((1.25 + 1.6) / 2)
    assert table[127] == pytest.approx(4.4 + 63 * (4.4 - 2.5) / 32)
    assert times.seconds(127) == table[127]
    assert times.seconds(0) == 0.0


def test_a_span_costs_the_same_at_every_size() -> None:
    times = StepTimes(SIZES, SECONDS, 0.1)
    assert times.table(80, 5)[1:] - times.table(80)[1:] == pytest.approx(np.full(79, 0.4))
    assert times.seconds(16, 16) == pytest.approx(1.6 + 15 * 0.1)


def test_a_larger_step_never_costs_less_whatever_was_measured() -> None:
    times = StepTimes([1, 2, 4], [3.0, 1.0, 5.0])
    assert times.table(5).tolist() == pytest.approx([0.0, 2.0, 2.0, 3.5, 5.0])


def test_one_size_alone_is_taken_to_be_proportional() -> None:
    assert StepTimes([4], [2.0]).seconds(8) == pytest.approx(4.0)


@given(times=measured(), stop=st.integers(0, 700), num_spans=st.integers(1, 64), seed=st.integers())
def test_laws_of_table_and_hull(times: StepTimes, stop: int, num_spans: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.choice([0, 40])):
        times.observe(rng.randint(1, 900), rng.lognormvariate(-3, 3), rng.randint(1, 9))
    table, hull = times.table(stop, num_spans), times.hull(stop, num_spans)
    assert len(table) == len(hull) == stop
    if stop < 2:
        assert not table.any()
        assert not hull.any()
        return
    assert table[0] == hull[0] == 0.0
    table, hull = table[1:], hull[1:]
    assert (np.diff(table) >= 0).all()
    tiny = 1e-9 * table[-1]
    assert (hull <= table + tiny).all()
    assert (np.diff(hull, 2) >= -tiny).all(), "not convex"
    assert hull[0] == table[0]
    assert hull[-1] == table[-1]
    # the greatest: at every corner of the hull it stands on the table
    corners = 1 + np.flatnonzero(np.diff(hull, 2) > 1e-6 * table[-1])
    assert hull[corners] == pytest.approx(table[corners])


def test_tables_are_shared_and_cannot_be_written() -> None:
    times = StepTimes(SIZES, SECONDS)
    assert times.table(50, 2) is times.table(50, 2)
    for curve in (times.table(50), times.hull(50)):
        with pytest.raises(ValueError, match="read-only"):
            curve[3] = 0.0


@pytest.mark.parametrize(
    ("sizes", "seconds", "span_s"),
    [
        ([], [], 0.0),
        ([1, 2], [1.0], 0.0),
        ([0, 1], [1.0, 2.0], 0.0),
        ([2, 2], [1.0, 2.0], 0.0),
        ([1, 2], [1.0, 0.0], 0.0),
        ([1, 2], [1.0, math.nan], 0.0),
        ([1, 2], [1.0, math.inf], 0.0),
        ([1, 2], [1.0, 2.0], -0.1),
        ([1, 2], [1.0, 2.0], math.nan),
    ],
)
def test_what_cannot_have_been_measured(
    sizes: list[int], seconds: list[float], span_s: float
) -> None:
    with pytest.raises(ValueError, match=r"sizes|times"):
        StepTimes(sizes, seconds, span_s)


def test_json_and_back() -> None:
    times = StepTimes(SIZES, SECONDS, 0.3)
    again = StepTimes.from_json(json.loads(json.dumps(times.to_json())))
    assert again.sizes == times.sizes
    assert (again.table(100, 3) == times.table(100, 3)).all()


# --- corrections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.5, 0.6, 6.0])
@pytest.mark.parametrize("spans", [1, 4])
def test_it_converges_where_all_sizes_shift(factor: float, spans: int) -> None:
    times = StepTimes(SIZES, SECONDS, 0.05)
    before = times.table(100, spans).copy()
    follow(times, factor, SIZES, 40, spans)
    assert times.table(100, spans) == pytest.approx(factor * before, rel=0.03)


def test_a_shift_seen_at_one_size_alone_is_taken_for_the_machines() -> None:
    """It says nothing of the shape: the others follow, more slowly than the size itself."""
    times = StepTimes(SIZES, SECONDS)
    before = times.table(65).copy()
    follow(times, 1.5, [8], 60)
    ratio = times.table(65)[1:] / before[1:]
    assert ratio[7] == pytest.approx(1.5, abs=0.04)
    assert 1.2 < ratio[63] < 1.5
    assert ratio[0] == pytest.approx(ratio[63])
    follow(times, 1.5, [8], 800)
    assert times.table(65)[1:] == pytest.approx(1.5 * before[1:], rel=0.04)


def test_what_all_sizes_have_in_common_reaches_those_that_were_not_seen() -> None:
    times = StepTimes(SIZES, SECONDS)
    before = times.table(65).copy()
    follow(times, 1.5, [1, 6, 8], 60)
    assert times.table(65)[1:] == pytest.approx(1.5 * before[1:], rel=0.08)


def test_a_jump_stays_a_jump() -> None:
    """What 7 rows cost says nothing of 6, although they are neighbours."""
    sizes, seconds = [1, 6, 7, 16], [80e-3, 80e-3, 111e-3, 115e-3]
    times = StepTimes(sizes, seconds)
    follow(times, 1.1, [7, 7, 1, 7, 7], 40)
    assert times.seconds(7) / times.seconds(6) == pytest.approx(111 / 80, rel=0.03)


def test_sizes_seen_themselves_keep_their_own_correction() -> None:
    times = StepTimes(SIZES, SECONDS)
    truth = StepTimes(SIZES, SECONDS)
    for _ in range(200):
        times.observe(6, truth.seconds(6))
        times.observe(7, 1.4 * truth.seconds(7))
    assert times.seconds(6) == pytest.approx(truth.seconds(6), rel=0.03)
    assert times.seconds(7) == pytest.approx(1.4 * truth.seconds(7), rel=0.03)


@pytest.mark.parametrize("spike", [10.0, 0.01])
def test_single_spikes_change_nothing(spike: float) -> None:
    times = StepTimes(SIZES, SECONDS)
    before = times.table(100).copy()
    for step in range(60):
        factor = spike if step % 7 == 0 else 1.0
        times.observe(8, factor * 1.25)
    assert (times.table(100) == before).all()


def test_noise_does_not_make_the_table_jitter() -> None:
    times, rng = StepTimes(SIZES, SECONDS), random.Random(0)
    follow(times, 1.3, SIZES, 40)
    changes, last = 0, times.table(65)
    for _ in range(500):
        times.observe(16, 1.3 * 1.6 * rng.lognormvariate(0.0, 0.03))
        changes += times.table(65) is not last
        last = times.table(65)
    assert changes < 25
    assert times.seconds(16) == pytest.approx(1.3 * 1.6, rel=0.04)


def test_the_same_observations_give_the_same_table() -> None:
    tables = []
    for _ in range(2):
        times, rng = StepTimes(SIZES, SECONDS), random.Random(3)
        for _ in range(300):
            times.observe(rng.randint(1, 64), rng.lognormvariate(0.5, 0.5), rng.randint(1, 4))
        tables.append(times.table(100))
    assert (tables[0] == tables[1]).all()
    assert not (tables[0] == StepTimes(SIZES, SECONDS).table(100)).all()


@pytest.mark.parametrize(
    ("num_tokens", "seconds"), [(257, 900.0), (8, 0.0), (8, math.inf), (8, math.nan)]
)
def test_what_says_nothing_is_not_used(num_tokens: int, seconds: float) -> None:
    times = StepTimes(SIZES, SECONDS)
    before = times.table(300)
    for _ in range(20):
        times.observe(num_tokens, seconds)
    assert times.table(300) is before
