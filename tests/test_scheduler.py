"""Model-free: continuous batching under random traffic, with sequences that only count."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.cache.blocks import BlockAllocator, Pages
from specinfer.engine.scheduler import Job, Scheduler
from specinfer.errors import CapacityError

MAX_NODES = 12


@dataclass(eq=False)
class Fake:
    """What the scheduler sees of a sequence."""

    num_tokens: int
    max_total: int
    num_computed: int = 0
    pages: Pages | None = None
    max_nodes: int = MAX_NODES

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass
class Traffic:
    """A scheduler, and sequences that come, grow, end and are aborted at random."""

    max_num_seqs: int
    budget: int
    num_blocks: int
    seed: int
    block_size: int = 4
    live: list[Fake] = field(default_factory=list)
    queue: list[Fake] = field(default_factory=list)  # not admitted yet, in order of arrival

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.allocator = BlockAllocator(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(
            self.allocator,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
        )

    def arrive(self, count: int = 1) -> None:
        """A request of `count` samples."""
        room = self.num_blocks * self.block_size - MAX_NODES
        prompt = int(self.rng.choice([1, 2, self.rng.integers(1, room)]))
        max_total = int(self.rng.integers(prompt + 1, room + 1))
        for _ in range(count):
            fake = Fake(prompt, max_total)
            self.scheduler.add(fake)  # type: ignore[arg-type]
            self.live.append(fake)
            self.queue.append(fake)

    def end(self, fake: Fake) -> None:
        self.scheduler.remove(fake)  # type: ignore[arg-type]
        self.live.remove(fake)
        if fake in self.queue:
            self.queue.remove(fake)
        assert fake.pages is None
        self.check()

    def step(self) -> list[Job]:
        jobs = self.scheduler.schedule()
        self.check()
        running: list[Fake] = self.scheduler.running  # type: ignore[assignment]
        new = [fake for fake in running if fake in self.queue]
        assert new == self.queue[: len(new)], "admitted out of order"
        self.queue = self.queue[len(new) :]
        self.check_shares(jobs)
        for job in jobs:
            self.advance(job)
        return jobs

    def check_shares(self, jobs: list[Job]) -> None:
        assert len({id(job.sequence) for job in jobs}) == len(jobs)
        assert len(jobs) <= self.max_num_seqs
        assert sum(job.num_tokens + job.max_nodes for job in jobs) <= self.budget
        for job in jobs:
            pending = job.sequence.num_pending
            assert 1 <= job.num_tokens <= pending
            assert job.emits == (job.num_tokens == pending)
            assert 0 <= job.max_nodes <= (MAX_NODES if pending == 1 else 0)

    def advance(self, job: Job) -> None:
        """Compute, and accept part of a tree."""
        fake: Fake = job.sequence  # type: ignore[assignment]
        fake.num_computed += job.num_tokens
        if job.emits:
            accepted = int(self.rng.integers(0, job.max_nodes + 1))
            new = min(accepted + 1, fake.max_total - fake.num_tokens)
            fake.num_tokens += new
            fake.num_computed += new - 1
            if fake.num_tokens == fake.max_total or self.rng.random() < 0.1:
                self.end(fake)

    def check(self) -> None:
        """Pages in use = pages owned, and enough for whatever may come."""
        owned = [block for fake in self.live if fake.pages for block in fake.pages.blocks]
        assert len(set(owned)) == len(owned)
        assert self.allocator.num_free == self.num_blocks - len(owned)
        running: list[Fake] = self.scheduler.running  # type: ignore[assignment]
        assert len(running) <= self.max_num_seqs
        for fake in running:
            assert fake.pages is not None
            assert fake.pages.capacity >= fake.max_total + MAX_NODES


def drain(traffic: Traffic) -> Iterator[list[Job]]:
    """Steps until nothing is left; fails where that takes longer than computing one by one."""
    limit = 10 + sum(fake.max_total + 1 for fake in traffic.live)
    for _ in range(limit):
        if not traffic.scheduler.has_work:
            assert not traffic.live
            assert traffic.allocator.num_free == traffic.num_blocks
            return
        jobs = traffic.step()
        assert jobs, "there was work and nothing was scheduled"
        yield jobs
    pytest.fail("some sequence starves")


@settings(max_examples=60, deadline=None)
@given(
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    num_blocks=st.integers(5, 30),
    seed=st.integers(0, 2**16),
)
def test_random_traffic(max_num_seqs: int, budget: int, num_blocks: int, seed: int) -> None:
    traffic = Traffic(max_num_seqs, budget, num_blocks, seed)
    for _ in range(60):
        event = traffic.rng.random()
        if event < 0.3:
            traffic.arrive(count=int(traffic.rng.choice([1, 1, 1, 3])))
        elif event < 0.4 and traffic.live:  # aborted, waiting or running
            traffic.end(traffic.live[int(traffic.rng.integers(len(traffic.live)))])
        else:
            traffic.step()
    for _ in drain(traffic):
        pass


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_nobody_starves_when_the_budget_is_smaller_than_the_batch(budget: int) -> None:
    traffic = Traffic(max_num_seqs=6, budget=budget, num_blocks=60, seed=1)
    for _ in range(12):
        traffic.arrive()
    for _ in drain(traffic):
        pass


def test_a_budget_below_the_tree_cuts_the_tree() -> None:
    traffic = Traffic(max_num_seqs=4, budget=10, num_blocks=60, seed=0)
    for _ in range(4):
        fake = Fake(1, 40)
        traffic.scheduler.add(fake)  # type: ignore[arg-type]
        traffic.live.append(fake)
        traffic.queue.append(fake)
    jobs = traffic.step()
    assert [job.max_nodes for job in jobs] == [1, 1, 1, 1]  # (10 - 4) // 4
    for fake in traffic.live[1:]:
        traffic.end(fake)
    assert [job.max_nodes for job in traffic.step()] == [9]


def test_long_prompts_are_cut_and_do_not_hold_up_those_who_decode() -> None:
    traffic = Traffic(max_num_seqs=4, budget=8, num_blocks=60, seed=0)
    short, long = Fake(1, 40), Fake(30, 40)
    for fake in (short, long):
        traffic.scheduler.add(fake)  # type: ignore[arg-type]
        traffic.live.append(fake)
        traffic.queue.append(fake)
    for step in itertools.count():
        jobs = traffic.scheduler.schedule()
        traffic.check_shares(jobs)
        shares = {id(job.sequence): job for job in jobs}
        assert shares[id(short)].emits
        job = shares[id(long)]
        assert job.num_tokens == min(7, 30 - 7 * step)
        assert job.emits == (step == 4)
        short.num_tokens, short.num_computed = short.num_tokens + 1, short.num_computed + 1
        long.num_computed += job.num_tokens
        if job.emits:
            break


def test_first_come_first_served_even_where_a_later_one_would_fit() -> None:
    allocator = BlockAllocator(10, 4)
    scheduler = Scheduler(allocator, max_num_seqs=4, max_num_batched_tokens=99)
    first, big, small = (Fake(2, total, max_nodes=0) for total in (24, 24, 4))
    for fake in (first, big, small):
        scheduler.add(fake)  # type: ignore[arg-type]
    scheduler.schedule()
    assert scheduler.running == [first]
    scheduler.remove(first)  # type: ignore[arg-type]
    scheduler.schedule()
    assert scheduler.running == [big, small]


def test_what_could_never_run_is_refused_at_once() -> None:
    allocator = BlockAllocator(4, 4)
    scheduler = Scheduler(allocator, max_num_seqs=4, max_num_batched_tokens=99)
    scheduler.add(Fake(1, 13, max_nodes=3))  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match="up to 14 tokens and a tree of 3 nodes"):
        scheduler.add(Fake(1, 14, max_nodes=3))  # type: ignore[arg-type]
    assert len(scheduler.waiting) == 1
