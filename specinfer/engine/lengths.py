"""How long an output will be, learnt from what was served: for the policy "predicted".

The idea is ALISE's (arXiv 2410.23537), shortest predicted remaining output first; the predictor is
not its neural one: the median of the latest outputs to prompts of about the same length.
"""

from collections import deque
from statistics import median

_LATEST = 64
"""Outputs remembered per bucket."""

_FEWEST = 4
"""Outputs a bucket must have seen before it is believed."""

_NEWS = 8
"""Outputs after which it is worth asking again."""


class LengthPredictor:
    """Output lengths by the prompt's length: a bucket per power of two, and one for all."""

    def __init__(self) -> None:
        self._buckets: dict[int, deque[int]] = {}
        self._all: deque[int] = deque(maxlen=_LATEST)
        self._known: dict[tuple[int, int], float | None] = {}  # asked since the last was learnt
        self._num_new = 0

    def learn(self, num_prompt: int, num_output: int) -> None:
        """Take in an output that came to its end."""
        bucket = self._buckets.setdefault(num_prompt.bit_length(), deque(maxlen=_LATEST))
        bucket.append(num_output)
        self._all.append(num_output)
        self._known.clear()
        self._num_new += 1

    def is_new(self) -> bool:
        """Whether enough was learnt since this was last true."""
        if self._num_new < _NEWS:
            return False
        self._num_new = 0
        return True

    def remaining(self, num_prompt: int, num_output: int, most: int) -> float:
        """Expect so many more output tokens of a request that has `num_output`.

        most     tokens that may still come: what is expected of those nothing is known about
        returns  the median of what is left of outputs that got as far, at most `most`
        """
        asked = num_prompt.bit_length(), num_output
        if asked not in self._known:
            self._known[asked] = self._median(*asked)
        known = self._known[asked]
        return float(most) if known is None else min(known, most)

    def _median(self, bucket: int, num_output: int) -> float | None:
        for lengths in (self._buckets.get(bucket, ()), self._all):
            rest = [length - num_output for length in lengths if length > num_output]
            if len(rest) >= _FEWEST:
                return float(median(rest))
        return None
