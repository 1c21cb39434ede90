"""A drafter as the engine asks it: its passes are timed, and its failure is nobody else's."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from torch import Tensor

from specinfer.draft.base import Draft, Drafter, DrafterFailedError, LevelDrafter, Pick, Planned
from specinfer.draft.model import ModelDrafter
from specinfer.engine.stats import EngineStats, Pass
from specinfer.ops.native import Growing

_log = logging.getLogger("specinfer")


class TimedDrafter:
    """A drafter whose passes count as "draft", and whose failure ends its service, nobody else's.

    is_failed  whether it raised: from then on it is not asked
    """

    def __init__(self, drafter: Drafter, source: int, stats: EngineStats) -> None:
        self._source = source
        self.name = drafter.name
        self.max_positions = drafter.max_positions
        self.is_failed = False
        self.has_levels = isinstance(drafter, LevelDrafter) and drafter.has_levels
        self._drafter = drafter
        self._stats = stats
        self._uncounted = (0, 0.0)  # tokens and seconds before a pass that has yet to be counted

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor | list[list[Pick]]:
        """See `Drafter.expand`.

        raises  DrafterFailedError where the drafter raises
        """
        if self.is_failed:
            raise DrafterFailedError(self.name)
        start, answer = time.perf_counter(), None
        with self.guarded(), self._stats.timed("draft"):
            answer = self._drafter.expand(frontier)
        if answer is None:
            raise DrafterFailedError(self.name)
        num_nodes = sum(len(nodes) for _, nodes in frontier)
        before, before_s = self._uncounted
        self._uncounted = (0, 0.0)
        # Drafters without a model feed none
        num_tokens = before + getattr(self._drafter, "num_fed", num_nodes)
        seconds = before_s + time.perf_counter() - start
        self._stats.passes.append(Pass(self._source, num_nodes, len(frontier), num_tokens, seconds))
        return answer

    def grow_on(
        self, drafts: Sequence[tuple[Draft, int]], growing: Growing, num_rounds: int, most: int
    ) -> bool:
        """`ModelDrafter.grow_on`; whether it was done, or the drafter failed over it."""
        if self.is_failed or not isinstance(self._drafter, ModelDrafter):
            return False
        passes = None
        with self.guarded():
            passes = self._drafter.grow_on(drafts, growing, num_rounds, most)
        for num_nodes, num_spans, seconds in passes or ():
            self._stats.passes.append(Pass(self._source, num_nodes, num_spans, num_nodes, seconds))
            self._stats.seconds["draft"] += seconds
            self._stats.nested_s += seconds
        return passes is not None or self.is_failed

    def draft_levels(self, asked: list[Planned]) -> list[list[int]] | None:
        """See `LevelDrafter.draft_levels`; every level counts as a pass, all of the same time.

        Where they are too many, what texts lacked may have been computed: it counts with the pass
        that follows, which on a GPU is also the one that waits for it.

        raises  DrafterFailedError where the drafter raises
        """
        if self.is_failed:
            raise DrafterFailedError(self.name)
        assert isinstance(self._drafter, LevelDrafter)
        start, answer = time.perf_counter(), None
        with self.guarded(), self._stats.timed("draft"):
            answer = self._drafter.draft_levels(asked)
        if self.is_failed:
            raise DrafterFailedError(self.name)
        seconds = time.perf_counter() - start
        if answer is not None:
            self._count_levels([each.plan.levels for each in asked], seconds)
        else:
            self._uncounted = getattr(self._drafter, "num_fed", 0), seconds
        return answer

    def _count_levels(self, levels: list[list[list[int]]], seconds: float) -> None:
        """One pass per level; only the first has more tokens than nodes."""
        sizes = [
            [len(nodes) for nodes in level if nodes] for level in zip_longest(*levels, fillvalue=[])
        ]
        num_nodes = sum(sum(level) for level in sizes)
        missed = getattr(self._drafter, "num_fed", num_nodes) - num_nodes
        for level in sizes:
            count = sum(level)
            own = Pass(self._source, count, len(level), count + missed, seconds / len(sizes))
            self._stats.passes.append(own)
            missed = 0

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`."""
        if not self.is_failed:
            with self.guarded():
                self._drafter.admit(accepted)

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        if not self.is_failed:
            with self.guarded():
                self._drafter.drop(key)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Ask something of the drafter; where that raises, its service ends."""
        try:
            yield
        except Exception as error:
            self.is_failed = True
            self._stats.failed_drafters[self.name] = repr(error)
            _log.error(
                "drafter %s failed and is dropped: serving goes on without it",
                self.name,
                exc_info=error,
            )
