"""Trees against plain steps by the clock: rates made of chance, no engine."""

import random

import pytest

from specinfer.engine.trial import Trial


def serve(
    gain: float, *, noise: float = 0.1, seed: int = 0, steps: int = 4000, expected: float = 9.0
) -> tuple[Trial, list[bool]]:
    """Steps whose trees bring `gain` times the tokens per second of plain ones, which is 1.

    expected  what plain ones are thought to bring
    """
    trial, rng, drafted = Trial(), random.Random(seed), []
    for _ in range(steps):
        with_tree = trial.rest == 0
        tokens = 1 + (rng.randrange(5) if with_tree else 0)  # three on average
        seconds = (3.0 / gain if with_tree else 1.0) * rng.lognormvariate(0.0, noise)
        trial.add(tokens, seconds, drafted=with_tree, expected=expected)
        drafted.append(with_tree)
    return trial, drafted


@pytest.mark.parametrize("seed", range(5))
def test_trees_that_win_are_hardly_ever_left_out(seed: int) -> None:
    _, drafted = serve(1.5, seed=seed)
    assert sum(drafted) > 0.97 * len(drafted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gain", [0.5, 0.8])
def test_trees_that_lose_are_left_out(gain: float, seed: int) -> None:
    _, drafted = serve(gain, seed=seed)
    assert sum(drafted[1000:]) < 0.1 * 3000


@pytest.mark.parametrize("seed", range(5))
def test_what_makes_no_difference_costs_little_to_find_out(seed: int) -> None:
    """Whatever it decides: neither is wrong. But no verdict is hasty."""
    _, drafted = serve(1.0, seed=seed, steps=400)
    assert sum(drafted[:200]) > 0.5 * 200


def test_busy_moments_make_no_loser() -> None:
    trial, rng = Trial(), random.Random(1)
    for step in range(4000):
        with_tree = trial.rest == 0
        seconds = 2.0 if with_tree else 1.0
        if step % 40 == 5:
            seconds *= 50
        trial.add(
            1 + (rng.randrange(5) if with_tree else 0), seconds, drafted=with_tree, expected=9.0
        )
        assert trial.rest <= 11, "1.5 times the tokens per second"


def test_a_machine_that_changes_is_noticed() -> None:
    trial, drafted = serve(0.5, steps=1500)
    assert not any(drafted[-50:])
    rng = random.Random(2)
    count = 0
    for _ in range(6000):
        with_tree = trial.rest == 0
        count += with_tree
        trial.add(
            1 + 2 * with_tree,
            (1.5 if with_tree else 1.0) * rng.lognormvariate(0, 0.05),
            drafted=with_tree,
            expected=9.0,
        )
    assert count > 0.5 * 6000


def test_the_first_step_after_a_change_does_not_count() -> None:
    """Drafters catch up in it, and caches are full of what others used."""
    trial = Trial()
    for drafted in (True, True, *[False] * 4):
        trial.add(1, 100.0, drafted=drafted, expected=1.0)
    assert len(trial.drafted) == len(trial.plain) == 1
    trial.rest = 1
    for drafted in (False, True):
        trial.add(1, 100.0, drafted=drafted, expected=1.0)
    assert len(trial.drafted) == 1


def test_what_changing_costs_is_counted_where_nobody_asked_for_it() -> None:
    trial = Trial()
    for drafted in (True, True, False, True, False, True):
        trial.add(1, 100.0, drafted=drafted, expected=1.0)
    assert len(trial.drafted) == 3


def test_trees_that_win_beyond_doubt_are_not_compared() -> None:
    _, drafted = serve(2.0, expected=1.0)
    assert all(drafted)
    _, drafted = serve(1.1, expected=1.0)
    assert not all(drafted)
