import random
from itertools import product

import pytest

from specinfer.engine.chains import ChainController, GammaTune, SmartSpec
from specinfer.engine.times import StepTimes


def accept(rng: random.Random, drafted: int, acceptance: float) -> int:
    """Accepted tokens of a chain, each accepted by its own coin until one is not."""
    for token in range(drafted):
        if rng.random() >= acceptance:
            return token
    return drafted


def serve(
    controller: ChainController, acceptance: float, *, steps: int = 400, batch_size: int = 1
) -> list[int]:
    """The lengths of each step, one per sequence and step."""
    rng = random.Random(0)
    lengths = []
    for _ in range(steps):
        step = [controller.length(key, batch_size) for key in range(batch_size)]
        for key, length in enumerate(step):
            controller.observe(key, length, accept(rng, length, acceptance), batch_size)
        lengths += step
    return lengths


def smart(longest: int = 8, slope: float = 0.01, **options: float) -> SmartSpec:
    """A drafter at a twentieth of the target's 1 s, and `slope` seconds per further token."""
    target = StepTimes([1, 101], [1.0, 1.0 + 100 * slope])
    return SmartSpec(target, StepTimes([1, 100], [0.05, 0.05]), longest, **options)


@pytest.mark.parametrize("controller", [GammaTune(6), smart(6)])
def test_an_ended_sequence_leaves_what_others_do_as_it_was(controller: ChainController) -> None:
    for _ in range(5):
        controller.observe(1, 3, 3, 2)
        controller.observe(2, 3, 0, 2)
    before = controller.length(2, 2)
    controller.drop(1)
    controller.drop(1)
    assert controller.length(2, 2) == before


# --- GammaTune ------------------------------------------------------------------------------------


def test_gamma_grows_to_its_bound_while_all_is_accepted() -> None:
    lengths = serve(GammaTune(9, initial=2), 1.0, steps=20)
    assert lengths[:8] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert set(lengths[8:]) == {9}


def test_gamma_falls_to_one_while_nothing_is_accepted() -> None:
    lengths = serve(GammaTune(9), 0.0, steps=40)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1


def test_gamma_recovers_from_its_lower_bound() -> None:
    controller = GammaTune(9)
    serve(controller, 0.0)
    assert serve(controller, 1.0, steps=20)[-1] == 9


def test_gamma_follows_the_accepted_length() -> None:
    means = [
        sum(lengths) / len(lengths) for a in (0.2, 0.6, 0.9) if (lengths := serve(GammaTune(16), a))
    ]
    assert 1 <= means[0] < 2 < means[1] < 4 < means[2] < 12


def test_gamma_is_a_sequence_s_own_and_forgotten_with_it() -> None:
    controller = GammaTune(9, initial=4)
    for _ in range(9):
        controller.observe(1, 4, 4, 2)
    assert (controller.length(1, 2), controller.length(2, 2)) == (9, 4)
    controller.drop(1)
    assert controller.length(1, 2) == 4


def test_gamma_learns_nothing_from_a_step_without_a_chain() -> None:
    controller = GammaTune(9)
    controller.observe(1, 0, 0, 1)
    assert controller.length(1, 1) == 4


# --- SmartSpec ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "batch_size", "slope"),
    list(product((0.0, 0.3, 0.7, 1.0), (1, 4, 32), (0.0, 0.02, 1.0))),
)
def test_smart_is_the_best_of_all_lengths(acceptance: float, batch_size: int, slope: float) -> None:
    controller = smart(acceptance=acceptance, slope=slope)
    expected = {}
    for k in range(9):
        accepted = k + 1 if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)
        step_s = k * 0.05 + 1 + slope * (batch_size * (k + 1) - 1)
        expected[k] = batch_size * accepted / step_s
    chosen = controller.length(0, batch_size)
    assert expected[chosen] == pytest.approx(max(expected.values()))
    assert controller.goodput(chosen, batch_size) == pytest.approx(expected[chosen])


def test_smart_learns_acceptance_without_bias() -> None:
    controller = smart(smoothing=0.002, slope=0.0)
    serve(controller, 0.4, steps=4000)
    assert controller.acceptance == pytest.approx(0.4, abs=0.06)


def test_smart_drafts_less_for_a_larger_batch() -> None:
    controller = smart(slope=0.02, acceptance=0.8)
    lengths = [controller.length(0, batch_size) for batch_size in (1, 8, 64, 512)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] >= 4
    assert lengths[-1] == 0


def test_smart_has_one_length_per_step() -> None:
    lengths = serve(smart(slope=0.01), 0.7, steps=200, batch_size=8)
    steps = [set(lengths[i : i + 8]) for i in range(0, len(lengths), 8)]
    assert all(len(step) == 1 for step in steps)
    assert len(set(lengths)) > 1, "nothing was tested: the length never changed"


def test_smart_stops_where_nothing_is_accepted_and_finds_back() -> None:
    controller = smart(probe_every=10)
    assert sum(serve(controller, 0.0)[-100:]) <= 10, "more than one token per ten steps"
    assert serve(controller, 1.0, steps=2000)[-1] == 8


def test_smart_without_probes_stays_at_none() -> None:
    controller = smart(probe_every=0, acceptance=0.0)
    assert set(serve(controller, 1.0)) == {0}


def test_smart_may_not_draft_where_there_is_no_room() -> None:
    assert set(serve(smart(0), 1.0)) == {0}
