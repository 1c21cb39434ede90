"""Continuous batching: who computes how much in the next step. Knows no tensor.

There is no prompt phase: computed tokens chase known tokens, and a sequence whose root alone is
left may spend further tokens of the step's budget on a tree.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specinfer.cache.blocks import BlockAllocator
from specinfer.errors import CapacityError

if TYPE_CHECKING:
    from specinfer.engine.sequence import Sequence


@dataclass(slots=True)
class Job:
    """One sequence's share of a step.

    num_tokens  known tokens to compute
    emits       whether they reach the end of what is known, so that the last one's logits are due
    max_nodes   drafted nodes it may add
    """

    sequence: "Sequence"
    num_tokens: int
    emits: bool
    max_nodes: int = 0


class Scheduler:
    """First come, first served.

    Pages are reserved on admission, so a running sequence never waits for memory.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._allocator = allocator
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def num_slots(self) -> int:
        """Tokens, drafted nodes included, that the pages hold."""
        return self._allocator.num_blocks * self._allocator.block_size

    @property
    def usage(self) -> float:
        """The share of the pages that is in use."""
        return 1 - self._allocator.num_free / self._allocator.num_blocks

    def check_fits(self, max_total: int, max_nodes: int) -> None:
        """Refuse a sequence that could never be admitted.

        max_total  tokens, prompt included; max_nodes  drafted nodes it may add to a step

        raises  CapacityError if its pages are more than there are
        """
        needed = self._allocator.blocks_for(max_total + max_nodes)
        if needed > self._allocator.num_blocks:
            size = self._allocator.block_size
            raise CapacityError(
                f"a request of up to {max_total} tokens and a tree of {max_nodes} nodes "
                f"needs {needed * size} tokens of KV cache and there are "
                f"{self.num_slots}: raise kv_cache_memory or lower max_tokens"
            )

    def add(self, sequence: "Sequence") -> None:
        """Queue a sequence."""
        self.check_fits(sequence.max_total, sequence.max_nodes)
        self.waiting.append(sequence)

    def schedule(self) -> list[Job]:
        """Admit what fits, then share the step's tokens.

        Roots come first, then prompt chunks in order of arrival; trees get what is left.
        """
        self._admit()
        budget = self._max_num_batched_tokens
        decoding = [s for s in self.running if s.num_pending == 1][:budget]
        budget -= len(decoding)
        jobs = {id(s): Job(s, 1, True) for s in decoding}
        for sequence in self.running:
            if sequence.num_pending > 1 and budget > 0:
                chunk = min(sequence.num_pending, budget)
                budget -= chunk
                jobs[id(sequence)] = Job(sequence, chunk, chunk == sequence.num_pending)
        for sequence in decoding:
            jobs[id(sequence)].max_nodes = min(sequence.max_nodes, budget // len(decoding))
        return [jobs[id(s)] for s in self.running if id(s) in jobs]

    def remove(self, sequence: "Sequence") -> None:
        """Take an ended sequence out and free its pages."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._allocator.free(sequence.pages)
        sequence.pages = None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            waiting = self.waiting[0]
            pages = self._allocator.allocate(waiting.max_total + waiting.max_nodes)
            if pages is None:
                return
            sequence = self.waiting.popleft()
            sequence.pages = pages
            self.running.append(sequence)
