"""Continuous batching: who computes how much in the next step. Knows no tensor.

There is no prompt phase: computed tokens chase known tokens, and a sequence whose root alone is
left may spend further tokens of the step's budget on a tree.

Memory is given as text grows. On admission a sequence gets blocks for what is known of it, shared
with others as far as its text is published; then a block whenever its root needs one. When none is
left, trees give way first, then whole sequences, the latest first: they wait again and are
recomputed, mostly from what was published. The first of them all never gives way, so there is
always one that gets on.
"""

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from specinfer.cache.blocks import BlockAllocator
from specinfer.config import EngineConfig
from specinfer.engine.lengths import LengthPredictor
from specinfer.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from specinfer.engine.sequence import Sequence
    from specinfer.engine.stats import EngineStats

LEVEL_STEPS = 1000
"""Steps of waiting that are worth one level of priority: so long, and nobody waits for ever."""

_turn = attrgetter("due", "number")
_rank = attrgetter("priority", "number")


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
    """Who waits, who runs, and what each does in a step.

    waiting  in the order of admission: by `due`, then by arrival
    running  by priority, then by arrival: the last gives way first
    """

    def __init__(
        self, allocator: BlockAllocator, config: EngineConfig, stats: "EngineStats"
    ) -> None:
        self._lengths = LengthPredictor()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._allocator = allocator
        self._config = config
        self._stats = stats
        self._clock = 0  # steps so far
        self._is_short = False  # of memory for the next in the queue, when last looked at
        self._gauge()

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
        """Refuse a sequence that would not fit if it were alone.

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

    def check_priority(self, priority: int) -> None:
        """Refuse a priority that nobody would look at.

        raises  RequestError
        """
        if priority and self._config.scheduling_policy != "priority":
            raise RequestError(
                f"priority={priority} needs scheduling_policy='priority' and it is "
                f"{self._config.scheduling_policy!r}: leave priority out"
            )

    def add(self, sequence: "Sequence") -> None:
        """Queue a sequence."""
        self.check_fits(sequence.max_total, sequence.max_nodes)
        sequence.arrival = self._clock
        self._queue(sequence)
        self._gauge()

    def schedule(self) -> list[Job]:
        """Share the step's tokens and blocks.

        Roots come first, then the prompts of those that run, then who waits; trees get what is
        left. While somebody writes, all prompts of a step together are one chunk.
        """
        self._clock += 1
        num_preemptions, budget = self._stats.num_preemptions, self._config.max_num_batched_tokens
        jobs = [Job(each, 1, True) for each in self._secure_roots(budget)]
        num_writing, budget = len(jobs), budget - len(jobs)
        chunk = min(budget, self._config.chunked_prefill_size) if jobs else budget
        left = chunk
        if num_writing < len(self.running):
            prompts = [each for each in self.running if each.num_pending > 1]
            for sequence in sorted(prompts, key=_turn):
                left -= self._compute(sequence, left, jobs)
        self._is_short = num_preemptions < self._stats.num_preemptions
        if self.waiting and not self._is_short:
            self._look_again()
            while left > 0 and (admitted := self._admit()) is not None:
                left -= self._compute(admitted, left, jobs)
        self._give_nodes(jobs, num_writing, budget + left - chunk)
        self._gauge()
        return jobs

    def remove(self, sequence: "Sequence") -> None:
        """Take an ended sequence out and free its pages."""
        if sequence.pages is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._give_back(sequence)
        if sequence.is_served:
            self._lengths.learn(sequence.num_prompt, sequence.num_output)
        self._gauge()

    def clear(self) -> list["Sequence"]:
        """Take out all that run, and forget every text in the pages; returns who ran.

        For what cannot be told any more: a step that failed may have left anything there.
        """
        ran, self.running = self.running, []
        for sequence in ran:
            sequence.pages = None
        self._allocator.reset()
        self._gauge()
        return ran

    def forget_unused(self) -> None:
        """Forget the texts in the pages that nobody uses: some may have been computed wrongly."""
        self._allocator.forget_kept()
        self._gauge()

    def _gauge(self) -> None:
        self._stats.num_waiting = len(self.waiting)
        self._stats.num_running = len(self.running)
        is_short = self._is_short and self.waiting
        self._stats.num_places = len(self.running) if is_short else self._config.max_num_seqs
        self._stats.num_blocks = self._allocator.num_blocks
        self._stats.num_blocks_used = self._allocator.num_blocks - self._allocator.num_free

    # --- who has a place --------------------------------------------------------------------------

    def _secure_roots(self, most: int) -> list["Sequence"]:
        """Those that write and may go on, each with a place for its root."""
        secured = []
        for sequence in [each for each in self.running if each.num_pending == 1][:most]:
            if sequence.pages is None:
                break  # gave way, and so did all that come after
            num_known = len(sequence.tokens)
            if num_known <= sequence.pages.capacity or self._make_room(sequence, num_known):
                secured.append(sequence)
        for sequence in secured:  # only now: from here on nobody gives way
            self._publish(sequence, len(sequence.tokens))
        return secured

    def _make_room(self, sequence: "Sequence", num_tokens: int) -> bool:
        """Give a root its block, if need be by sending back who ranks last, itself perhaps."""
        assert sequence.pages is not None
        while not self._allocator.extend(sequence.pages, num_tokens):
            if self._trim():
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _trim(self) -> bool:
        """Take back what trees were lent in earlier steps; whether there was any."""
        before = self._allocator.num_free
        for sequence in self.running:
            assert sequence.pages is not None
            self._allocator.trim(sequence.pages, len(sequence.tokens))
        return self._allocator.num_free > before

    def _preempt(self, sequence: "Sequence") -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.stats.num_preemptions += 1
        self._stats.num_preemptions += 1
        self._queue(sequence)

    def _admit(self) -> "Sequence | None":
        """Let the first in the queue run, if there is room for what is known of it.

        Every one that runs must be able to get another block afterwards: who is let in too early
        is soon sent back.
        """
        if not self.waiting or len(self.running) >= self._config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        shared = self._find(sequence)
        while sequence.pages is None:
            sequence.pages = self._allocator.allocate(
                len(sequence.tokens),
                shared,
                room=sequence.max_total + sequence.max_nodes,
                spare=len(self.running),
            )
            if sequence.pages is None and not self._trim():
                self._is_short = True
                return None
        insort(self.running, self.waiting.pop(0), key=_rank)
        sequence.num_computed = len(shared) * self._allocator.block_size
        if self._reads_cache(sequence) and not sequence.stats.num_preemptions:
            sequence.stats.num_cached_tokens = sequence.num_computed
            self._stats.num_prefix_queries += len(sequence.tokens)
            self._stats.num_prefix_hits += sequence.num_computed
        return sequence

    def _give_nodes(self, jobs: list[Job], num_writing: int, budget: int) -> None:
        """Trees: equal shares of the tokens and of the blocks that are left.

        num_writing  jobs that are roots alone; others are, where all but a prompt's last token was
                     shared
        """
        writing = jobs[:num_writing]
        writing += [job for job in jobs[num_writing:] if job.sequence.num_pending == 1]
        for done, job in enumerate(writing):
            sequence, num_known = job.sequence, len(job.sequence.tokens)
            assert sequence.pages is not None
            nodes = min(sequence.max_nodes, budget // len(writing))
            capacity = sequence.pages.capacity
            if num_known + nodes > capacity:
                share = self._allocator.num_free // (len(writing) - done)
                nodes = min(nodes, capacity + share * self._allocator.block_size - num_known)
                self._allocator.extend(sequence.pages, num_known + nodes)
            job.max_nodes = nodes

    # --- texts that are shared --------------------------------------------------------------------

    def _compute(self, sequence: "Sequence", left: int, jobs: list[Job]) -> int:
        """Add the job of as many known tokens as may be computed; returns how many."""
        count = min(sequence.num_pending, left)
        if count:
            jobs.append(Job(sequence, count, count == sequence.num_pending))
            self._publish(sequence, sequence.num_computed + count)
        return count

    def _find(self, sequence: "Sequence") -> list[int]:
        """Published blocks with its text; never all of it: the last token must be computed."""
        if not self._reads_cache(sequence):
            return []
        stop = len(sequence.tokens) - 1
        self._allocator.hash_blocks(sequence.hashes, sequence.tokens, stop, sequence.salt)
        return self._allocator.find(sequence.hashes)

    def _reads_cache(self, sequence: "Sequence") -> bool:
        return self._config.enable_prefix_caching and sequence.reads_cache

    def _publish(self, sequence: "Sequence", stop: int) -> None:
        """Share its full blocks among the first `stop` tokens."""
        assert sequence.pages is not None
        count = stop // self._allocator.block_size
        if self._config.enable_prefix_caching and count > len(sequence.pages.contents):
            self._allocator.hash_blocks(sequence.hashes, sequence.tokens, stop, sequence.salt)
            self._allocator.publish(sequence.pages, sequence.hashes[:count])

    def _give_back(self, sequence: "Sequence") -> None:
        """Free its pages, after what was computed of its text is published."""
        assert sequence.pages is not None
        # A text that ended inside an accepted path has fewer tokens than were computed.
        self._publish(sequence, min(sequence.num_computed, len(sequence.tokens)))
        self._allocator.free(sequence.pages)
        sequence.pages = None

    # --- whose turn it is -------------------------------------------------------------------------

    def _queue(self, sequence: "Sequence") -> None:
        sequence.due = self._due(sequence)
        insort(self.waiting, sequence, key=_turn)

    def _due(self, sequence: "Sequence") -> float:
        """When its turn is, in steps: who waits keeps it, while newcomers' turns come later."""
        if self._config.scheduling_policy == "fcfs":
            return 0.0
        if self._config.scheduling_policy == "priority":
            return sequence.arrival + LEVEL_STEPS * sequence.priority
        return sequence.arrival + self._lengths.remaining(
            sequence.num_prompt, sequence.num_output, sequence.num_left
        )

    def _look_again(self) -> None:
        """Predict anew for all that wait, once enough was learnt to predict otherwise."""
        if self._config.scheduling_policy == "predicted" and self._lengths.is_new():
            for sequence in self.waiting:
                sequence.due = self._due(sequence)
            self.waiting.sort(key=_turn)
