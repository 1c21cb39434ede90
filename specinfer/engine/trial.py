"""Trees against plain steps by the clock: whether speculating pays, whatever was expected.

Prices are estimates. Steps are not: where trees bring fewer tokens per second than plain steps do,
clearly and not by chance, nothing is drafted for a while.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

_ENOUGH = 32
_BLOCK = 8
"""Steps with trees, and without, before anything is said of them."""

_AGAIN = 8
"""Steps with trees after those that have lost."""

_COLD = 3
"""Plain steps that do not count after others: the processor's caches are still full of drafting."""

_CLEAR = 2.0
_DOUBT = 1.5
"""Standard errors by which trees are ahead beyond chance, and by which they are behind so far that
nothing is drafted for a while: who rests wrongly misses little, as they cannot be far ahead."""

_SURE = 1.3
"""Times what plain steps bring by the model of times: beyond it nothing needs to be compared."""

_OFTEN = 64
_SELDOM = 512
"""Steps with trees between two blocks of plain ones; seldom where trees win clearly."""

_SHORTEST_REST = 128
_LONGEST_REST = 2048

_SPIKE = 3.0
"""A step counts as at most so many times as long as the median one: the machine was busy."""

Steps = Collection[tuple[int, float]]


@dataclass(slots=True)
class Trial:
    """Steps of about one batch size, with drafted nodes and without.

    plain, drafted  tokens and seconds of the last ones
    rest            steps to come without a tree
    """

    plain: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=3 * _BLOCK))
    drafted: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=4 * _ENOUGH))
    rest: int = 0
    _next_rest: int = _SHORTEST_REST
    _num_plain: int = 0  # in a row
    _num_drafted: int = 0  # in a row
    _since_plain: int = _OFTEN - _ENOUGH
    _enough: int = _ENOUGH
    _was_told: bool = True  # the last plain step

    def add(self, tokens: int, seconds: float, *, drafted: bool, expected: float) -> None:
        """Count a step, and decide whether the next ones go without a tree.

        expected  tokens per second of a plain step, by the model of times
        """
        was_told, self.rest = self.rest > 0, max(0, self.rest - 1)
        if drafted:
            self._add_drafted(tokens, seconds, expected)
            return
        self._was_told = was_told
        self._num_plain += 1
        self._num_drafted = 0
        if self._num_plain > _COLD:
            self.plain.append((tokens, seconds))
        if self._num_plain == _COLD + _BLOCK:
            self._since_plain = 0
            self._judge()

    def _add_drafted(self, tokens: int, seconds: float, expected: float) -> None:
        self._num_plain = 0
        self._num_drafted += 1
        self._since_plain += 1
        # The first one catches up with what was not drafted. Who was told to rest is not to blame.
        if self._num_drafted > 1 or not self._was_told:
            self.drafted.append((tokens, seconds))
        enough = len(self.drafted) >= self._enough and self._since_plain >= _OFTEN
        if enough and self._since_plain % _BLOCK == 0 and self._is_due(expected):
            self.rest = _COLD + _BLOCK

    def _is_due(self, expected: float) -> bool:
        """Whether plain steps should be taken to compare with."""
        if math.exp(_log_rate(self.drafted)[0]) > _SURE * expected:
            return False
        wins = len(self.plain) >= _BLOCK and self.advantage > _CLEAR
        return not wins or self._since_plain >= _SELDOM

    def _judge(self) -> None:
        """With plain steps just taken: rest, the longer the oftener trees have lost."""
        if len(self.drafted) < self._enough:
            return
        if self.advantage < -_DOUBT:
            self.rest, self._next_rest = self._next_rest, min(_LONGEST_REST, 4 * self._next_rest)
            self.drafted.clear()
            self._enough = _AGAIN
            self._since_plain = _OFTEN - _AGAIN
        elif self.advantage > _CLEAR:
            self._next_rest = _SHORTEST_REST
            self._enough = _ENOUGH

    @property
    def advantage(self) -> float:
        """By how many standard errors the log of trees' tokens per second is above plain ones'."""
        plain, plain_variance = _log_rate(self.plain)
        drafted, variance = _log_rate(self.drafted)
        return (drafted - plain) / math.sqrt(plain_variance + variance + 1e-9)


def _log_rate(steps: Steps) -> tuple[float, float]:
    """Log of tokens per second, and its variance (of a ratio of sums, by the delta method)."""
    longest = _SPIKE * statistics.median(seconds for _, seconds in steps)
    clipped = [(tokens, min(seconds, longest)) for tokens, seconds in steps]
    tokens = sum(each for each, _ in clipped)
    rate = tokens / sum(seconds for _, seconds in clipped)
    off = sum((each - rate * seconds) ** 2 for each, seconds in clipped)
    return math.log(rate), off / tokens**2
