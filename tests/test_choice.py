"""Which drafters are asked: rewards made of chance, no drafter."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from specinfer.engine.choice import Arm, DrafterChoice, choices_of

ARMS = [(0, 2), (1, 2), (0, 1, 2)]


def play(
    choice: DrafterChoice, reward: Callable[[tuple[int, ...]], float], steps: int = 300
) -> list[tuple[int, ...]]:
    """What is chosen, where each choice brings its reward and noise."""
    rng, chosen = random.Random(3), []
    for _ in range(steps):
        arm = choice.choose()
        assert choice.choose() == arm, "it depends on the past alone"
        choice.learn(arm, reward(arm) + rng.choice((-1.0, 0.0, 1.0)))
        chosen.append(arm)
    return chosen


def test_arms_are_each_model_and_all_of_them() -> None:
    assert choices_of([0, 1], [2]) == ARMS
    assert choices_of([0], [2, 3]) == [(0, 2, 3)]
    assert choices_of([], [2]) == [(2,)]


@pytest.mark.parametrize(
    "rewards", [(3.0, 1.0, 2.5), (1.0, 3.0, 2.5), (2.0, 2.0, 3.5)], ids=["first", "second", "both"]
)
def test_the_better_choice_is_learnt(rewards: tuple[float, ...]) -> None:
    chosen = play(DrafterChoice.among(ARMS, {}), dict(zip(ARMS, rewards, strict=True)).__getitem__)
    assert set(chosen[:3]) == set(ARMS), "everything is tried"
    best = ARMS[int(np.argmax(rewards))]
    assert chosen[-100:].count(best) >= 85


def test_a_new_sequence_starts_from_what_others_saw() -> None:
    known: dict[tuple[int, ...], Arm] = {}
    rewards = dict(zip(ARMS, (1.0, 3.0, 2.0), strict=True))
    play(DrafterChoice.among(ARMS, known), rewards.__getitem__)
    fresh = DrafterChoice.among(ARMS, known)
    assert fresh.choose() == (1, 2)
    assert all(arm.count == 0 for arm in fresh.own)


def test_a_sequence_may_differ_from_the_others() -> None:
    known: dict[tuple[int, ...], Arm] = {}
    play(DrafterChoice.among(ARMS, known), dict(zip(ARMS, (2, 3, 2), strict=True)).__getitem__)
    rewards = dict(zip(ARMS, (4, 1, 2), strict=True))
    odd = play(DrafterChoice.among(ARMS, known), rewards.__getitem__, 600)
    assert odd[-100:].count((0, 2)) >= 80
