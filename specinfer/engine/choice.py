"""Which drafters one sequence asks, learnt from what each brought it and the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Arm:
    """One choice of drafters: what it brought."""

    total: float = 0.0
    squares: float = 0.0
    count: float = 0.0

    def add(self, reward: float) -> None:
        """Count a step."""
        self.total += reward
        self.squares += reward * reward
        self.count += 1.0

    @property
    def scatter(self) -> float:
        """Sum of squared distances from the mean."""
        return max(0.0, self.squares - self.total**2 / self.count) if self.count else 0.0


@dataclass(slots=True)
class DrafterChoice:
    """Which drafters are worth their time for one sequence: a bandit over measured goodput (SPIN).

    Arms are each drafter alone and all together; the reward of a step is its accepted tokens less
    the price of its passes. What other sequences saw of an arm is where a new one starts.

    arms    the drafters of each
    common  what all sequences saw of each arm
    source  SPIN (arXiv 2503.15921); upper confidence bounds (Auer et al. 2002), their width by how
            much rewards vary
    """

    arms: Sequence[tuple[int, ...]]
    common: Sequence[Arm]
    own: Sequence[Arm]

    @classmethod
    def among(
        cls, arms: Sequence[tuple[int, ...]], known: dict[tuple[int, ...], Arm]
    ) -> "DrafterChoice":
        """A new sequence's choice; `known` keeps what all sequences saw."""
        common = [known.setdefault(arm, Arm()) for arm in arms]
        return cls(arms, common, [Arm() for _ in arms])

    def choose(self) -> tuple[int, ...]:
        """The drafters of the next step, from past steps alone."""
        return self.arms[self._best()]

    def learn(self, sources: Sequence[int], reward: float) -> None:
        """Count a step: accepted tokens less the price of the drafters' passes, in tokens."""
        index = self.arms.index(tuple(sources))
        for arm in (self.own[index], self.common[index]):
            arm.add(reward)

    def _best(self) -> int:
        bounds: list[float] = []
        rounds = sum(arm.count for arm in self.own) + 2.0
        seen = sum(arm.count for arm in self.common)
        spread = math.sqrt(sum(arm.scatter for arm in self.common) / max(1.0, seen))
        for own, common in zip(self.own, self.common, strict=True):
            if common.count == 0:
                return len(bounds)  # nobody has tried it
            prior = common.total / common.count
            mean = (own.total + 2.0 * prior) / (own.count + 2.0)
            bonus = spread * math.sqrt(2.0 * math.log(rounds) / (own.count + 2.0))
            bounds.append(mean + bonus)
        return int(np.argmax(bounds))


def choices_of(drafters: Sequence[int], others: Sequence[int]) -> list[tuple[int, ...]]:
    """The arms: each model alone and all together, always with the sources that cost nothing."""
    if len(drafters) < 2:
        return [(*drafters, *others)]
    return [*((each, *others) for each in drafters), (*drafters, *others)]
