"""Model-free: who waits, who runs and who gives way, with sequences that only count.

Random traffic is in test_traffic.py; here is what a rule does in one small case.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from specinfer.cache.blocks import BlockAllocator
from specinfer.engine.lengths import LengthPredictor
from specinfer.engine.scheduler import LEVEL_STEPS, Job, Scheduler
from specinfer.errors import CapacityError, RequestError
from tests.traffic import Fake, advance, scheduler_with


def fakes(*lengths: tuple[int, int], max_nodes: int = 0, **fields: Any) -> list[Fake]:
    """Sequences of (prompt, most tokens), numbered, no two prompts alike."""
    return [
        Fake([1000 * number + n for n in range(prompt)], total, number, max_nodes, **fields)
        for number, (prompt, total) in enumerate(lengths)
    ]


def queue(scheduler: Scheduler, sequences: Sequence[Fake]) -> None:
    for each in sequences:
        scheduler.add(each)  # type: ignore[arg-type]


def step(scheduler: Scheduler) -> dict[int, Job]:
    """One token for everybody whose logits are due; who has all its tokens ends."""
    jobs = scheduler.schedule()
    for job in jobs:
        advance(job, [7])
        fake: Any = job.sequence
        if fake.num_left <= 0:
            fake.is_served = True
            scheduler.remove(fake)
    return {job.sequence.number: job for job in jobs}


def numbers(sequences: Sequence[Any]) -> list[int]:
    return [each.number for each in sequences]


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_nobody_starves_when_the_budget_is_smaller_than_the_batch(budget: int) -> None:
    scheduler = scheduler_with(BlockAllocator(60, 4), max_num_seqs=6, max_num_batched_tokens=budget)
    everybody = fakes(*[(5, 20)] * 12, max_nodes=3)
    queue(scheduler, everybody)
    for _ in range(12 * 20):
        assert 0 < sum(j.num_tokens + j.max_nodes for j in step(scheduler).values()) <= budget
        if not scheduler.has_work:
            break
    assert all(each.is_served for each in everybody)


def test_a_budget_below_the_tree_cuts_the_tree() -> None:
    scheduler = scheduler_with(BlockAllocator(60, 4), max_num_batched_tokens=10)
    everybody = fakes(*[(1, 40)] * 4, max_nodes=12)
    queue(scheduler, everybody)
    assert [job.max_nodes for job in scheduler.schedule()] == [1, 1, 1, 1]  # (10 - 4) // 4
    for each in everybody[1:]:
        scheduler.remove(each)  # type: ignore[arg-type]
    assert [job.max_nodes for job in scheduler.schedule()] == [9]


def test_long_prompts_are_cut_and_do_not_hold_up_those_who_write() -> None:
    scheduler = scheduler_with(
        BlockAllocator(90, 4), max_num_batched_tokens=40, chunked_prefill_size=7
    )
    queue(scheduler, fakes((30, 40), (30, 40)))
    assert [job.num_tokens for job in scheduler.schedule()] == [30, 10], "nobody writes: all of it"
    scheduler.clear()
    queue(scheduler, short := fakes((1, 90), max_nodes=12))
    assert list(step(scheduler)) == [0]
    queue(scheduler, late := fakes((9, 90), (30, 40), (2, 9))[1:])
    for number in itertools.count():
        jobs = step(scheduler)
        assert jobs[0].emits
        assert jobs[0].max_nodes > 0
        assert sum(job.num_tokens for job in jobs.values()) <= 1 + 7 + number // 4
        if number < 5:
            assert jobs[1].num_tokens == min(7, 30 - 7 * number)
        if number == 4:
            assert jobs[2].num_tokens == 2, "what is left of the chunk is the next one's"
            break
        assert 2 not in jobs
    assert [each.num_pending for each in (*short, *late)] == [1, 1, 1]


# --- memory ---------------------------------------------------------------------------------------


def test_first_come_first_served_even_where_a_later_one_would_fit() -> None:
    scheduler = scheduler_with(BlockAllocator(10, 4))
    queue(scheduler, fakes((24, 25), (24, 25), (2, 4)))
    step(scheduler)
    assert numbers(scheduler.running) == [], "one token and it is done"
    assert numbers(scheduler.waiting) == [1, 2]
    step(scheduler)
    assert numbers(scheduler.waiting) == []


def test_what_could_never_run_is_refused_at_once() -> None:
    scheduler = scheduler_with(BlockAllocator(4, 4))
    queue(scheduler, fakes((1, 13), max_nodes=3))
    with pytest.raises(CapacityError, match="up to 14 tokens and a tree of 3 nodes"):
        queue(scheduler, fakes((1, 14), max_nodes=3))
    assert len(scheduler.waiting) == 1


def test_blocks_are_taken_as_text_grows() -> None:
    allocator = BlockAllocator(20, 4)
    scheduler = scheduler_with(allocator)
    queue(scheduler, [fake := Fake([1] * 6, 40, max_nodes=0)])
    for num_known in range(6, 39):
        step(scheduler)
        assert allocator.num_blocks - allocator.num_free == -(-num_known // 4)
    step(scheduler)
    assert fake.is_served
    assert allocator.num_free == allocator.num_blocks


def test_trees_give_way_before_anybody_does() -> None:
    allocator = BlockAllocator(8, 4)
    scheduler = scheduler_with(allocator, enable_prefix_caching=False)
    first, second = everybody = fakes((4, 20), (4, 20), max_nodes=12)
    queue(scheduler, everybody)
    step(scheduler)
    nodes = []
    while len(first.tokens) < 16:
        nodes.append([job.max_nodes for job in step(scheduler).values()])
        assert scheduler._stats.num_preemptions == 0
    assert nodes[0] == [11, 11]  # 4 blocks each, 5 tokens
    assert nodes[-1] == [1, 1]
    assert all(a[0] >= b[0] for a, b in itertools.pairwise(nodes))
    step(scheduler)
    assert allocator.num_free == 0
    step(scheduler)
    assert scheduler._stats.num_preemptions == 1
    assert numbers(scheduler.running) == [0]
    assert numbers(scheduler.waiting) == [1]
    assert (second.num_computed, second.pages) == (0, None)


@pytest.mark.parametrize("priorities", [(0, 0, 0), (5, 0, -5), (0, 5, 0)])
def test_who_ranks_last_gives_way_and_comes_back_first(priorities: tuple[int, ...]) -> None:
    scheduler = scheduler_with(BlockAllocator(9, 4), scheduling_policy="priority")
    everybody = fakes((4, 30), (4, 30), (4, 30))
    for each, priority in zip(everybody, priorities, strict=True):
        each.priority = priority
    queue(scheduler, everybody)
    order = sorted(range(3), key=lambda n: (priorities[n], n))
    last = everybody[order[-1]]
    while not last.stats.num_preemptions:
        step(scheduler)
        assert not any(everybody[n].stats.num_preemptions for n in order[:-1])
    assert last.pages is None
    known = len(last.tokens)
    late = Fake([5000], 3, number=3, priority=priorities[order[-1]])
    queue(scheduler, [late])
    assert numbers(scheduler.waiting) == [last.number, 3]
    while scheduler.has_work:
        step(scheduler)
        if late.pages is not None or late.is_served:
            assert last.pages is not None or last.is_served
    assert known < len(last.tokens) == 30
    assert all(each.is_served for each in everybody)
    assert not everybody[order[0]].stats.num_preemptions


def test_who_is_sent_back_is_recomputed_from_what_is_kept() -> None:
    scheduler = scheduler_with(BlockAllocator(9, 4))
    everybody = fakes((9, 30), (9, 30))
    queue(scheduler, everybody)
    while not everybody[1].stats.num_preemptions:
        step(scheduler)
    known = len(everybody[1].tokens)
    scheduler.remove(everybody[0])  # type: ignore[arg-type]
    (job,) = scheduler.schedule()
    assert job.sequence is everybody[1]  # type: ignore[comparison-overlap]
    assert everybody[1].num_computed >= 4 * ((known - 1) // 4) - 4, "all but a block or so is kept"
    assert everybody[1].stats.num_cached_tokens == 0, "of the prompt nothing was there at first"
    assert scheduler._stats.num_prefix_hits == 0


def test_nobody_is_let_in_who_would_soon_be_sent_back() -> None:
    allocator = BlockAllocator(8, 4)
    scheduler = scheduler_with(allocator)
    queue(scheduler, fakes((4, 30), (4, 30), (20, 30)))
    step(scheduler)
    assert numbers(scheduler.running) == [0, 1]
    assert allocator.num_free == 6, "5 for the prompt leave 1 for two that write"


def test_places_are_those_that_run_while_memory_is_short() -> None:
    scheduler = scheduler_with(BlockAllocator(8, 4), max_num_seqs=4)
    everybody = fakes((4, 30), (4, 30), (20, 30))
    queue(scheduler, everybody)
    assert scheduler._stats.num_places == 4
    step(scheduler)
    assert scheduler._stats.num_places == len(scheduler.running) == 2
    scheduler.remove(everybody[2])  # type: ignore[arg-type]
    assert scheduler._stats.num_places == 4, "nobody waits for memory any more"
    while not everybody[1].stats.num_preemptions:
        step(scheduler)
    assert scheduler._stats.num_places == len(scheduler.running) == 1


# --- shared texts ---------------------------------------------------------------------------------


def same(count: int, prompt: int, total: int, **fields: Any) -> list[Fake]:
    return [Fake(list(range(prompt)), total, number, 0, **fields) for number in range(count)]


def test_samples_of_one_prompt_compute_it_once() -> None:
    """Even in one step: all K and V of a layer are written before any is read."""
    allocator = BlockAllocator(40, 4)
    scheduler = scheduler_with(allocator)
    queue(scheduler, same(3, 18, 30))
    assert [job.num_tokens for job in scheduler.schedule()] == [18, 2, 2]
    assert allocator.num_blocks - allocator.num_free == 4 + 3
    assert scheduler._stats.num_prefix_queries == 3 * 18
    assert scheduler._stats.num_prefix_hits == 2 * 16
    assert [s.stats.num_cached_tokens for s in scheduler.running] == [0, 16, 16]


@pytest.mark.parametrize("prompt", [15, 16, 17])
def test_the_last_token_is_computed_in_any_case(prompt: int) -> None:
    scheduler = scheduler_with(BlockAllocator(40, 4))
    queue(scheduler, same(1, prompt, prompt + 1))
    step(scheduler)
    queue(scheduler, [again := Fake(list(range(prompt)), 30, 1, 0)])
    (job,) = scheduler.schedule()
    assert again.num_computed == 4 * ((prompt - 1) // 4)
    assert job.num_tokens == prompt - again.num_computed
    assert job.emits


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"enable_prefix_caching": False}, {}),
        ({}, {"salt": b"other"}),
        ({}, {"reads_cache": False}),
    ],
)
def test_what_is_not_to_be_shared_is_not(options: dict[str, Any], fields: dict[str, Any]) -> None:
    scheduler = scheduler_with(BlockAllocator(40, 4), **options)
    queue(scheduler, same(1, 16, 17))
    step(scheduler)
    queue(scheduler, same(1, 16, 17, **fields))
    assert [job.num_tokens for job in scheduler.schedule()] == [16]
    assert scheduler._stats.num_prefix_hits == 0
    is_asked = not options and fields.get("reads_cache", True)
    assert scheduler._stats.num_prefix_queries == 16 * (is_asked + (not options))


# --- whose turn it is -----------------------------------------------------------------------------


def test_priorities_come_before_arrival() -> None:
    scheduler = scheduler_with(BlockAllocator(40, 4), scheduling_policy="priority", max_num_seqs=1)
    everybody = fakes(*[(2, 5)] * 4)
    for each, priority in zip(everybody, (1, 0, -3, 0), strict=True):
        each.priority = priority
    queue(scheduler, everybody)
    assert numbers(scheduler.waiting) == [2, 1, 3, 0]
    scheduler.check_priority(3)
    with pytest.raises(RequestError, match="needs scheduling_policy='priority' and it is 'fcfs'"):
        scheduler_with(BlockAllocator(4, 4)).check_priority(3)


def served_after(scheduler: Scheduler, waits: Fake, newcomer: Any) -> int:
    """Steps until a sequence runs while others arrive in every step."""
    for steps in itertools.count():
        queue(scheduler, [newcomer(steps)])
        step(scheduler)
        if waits.num_computed:
            return steps
    raise AssertionError


def test_no_stream_of_important_requests_keeps_the_others_waiting_for_ever() -> None:
    scheduler = scheduler_with(BlockAllocator(40, 4), scheduling_policy="priority", max_num_seqs=1)
    waits = Fake([1], 3, 0, 0, priority=2)
    queue(scheduler, [waits])
    steps = served_after(scheduler, waits, lambda n: Fake([2], 2, n + 1, 0, priority=1))
    assert LEVEL_STEPS <= steps <= LEVEL_STEPS + 3


def test_no_stream_of_short_requests_keeps_a_long_one_waiting_for_ever() -> None:
    scheduler = scheduler_with(BlockAllocator(99, 4), scheduling_policy="predicted", max_num_seqs=1)
    for _ in range(4):
        scheduler._lengths.learn(9, 150)
    queue(scheduler, [waits := Fake([1] * 9, 200, 0, 0)])
    steps = served_after(scheduler, waits, lambda n: Fake([2], 2, n + 1, 0))
    assert 145 <= steps <= 155


def test_the_predictor_learns_by_the_length_of_prompts() -> None:
    lengths = LengthPredictor()
    assert lengths.remaining(10, 0, most=77) == 77, "nothing is known"
    for _ in range(10):
        lengths.learn(10, 20)
        lengths.learn(500, 100)
    assert lengths.remaining(9, 0, most=77) == 20
    assert lengths.remaining(400, 0, most=300) == 100
    assert lengths.remaining(400, 0, most=77) == 77
    assert lengths.remaining(10, 15, most=77) == 5
    assert lengths.remaining(10, 20, most=77) == 77, "longer than any: those of other prompts"
    assert lengths.remaining(10, 20, most=300) == 80
    assert lengths.remaining(64, 0, most=300) == 60, "of all, where none was alike"
    for _ in range(64):
        lengths.learn(10, 50)
    assert lengths.remaining(10, 0, most=77) == 50, "the latest count"
    assert lengths.is_new()
    assert not lengths.is_new()


def mean_latency(policy: str) -> tuple[float, int]:
    """Steps from arrival to end, the mean and the longest; long answers are to long prompts."""
    rng = np.random.default_rng(3)
    scheduler = scheduler_with(
        BlockAllocator(4000, 4), scheduling_policy=policy, max_num_seqs=4, max_num_batched_tokens=64
    )
    arrivals = np.cumsum(rng.exponential(13.0, 400)).astype(int).tolist()
    ends: dict[int, int] = {}
    latencies = []
    for now in itertools.count():
        while arrivals and arrivals[0] <= now:
            start, number = arrivals.pop(0), len(ends)
            is_long = rng.random() < 0.3
            prompt = [number, *[1] * int(rng.integers(20, 40) if is_long else rng.integers(3, 12))]
            fake = Fake(prompt, 600, number, 0)
            ends[number] = len(prompt) + int(
                rng.normal(150, 30) if is_long else rng.integers(5, 20)
            )
            fake.arrived = start  # type: ignore[attr-defined]
            queue(scheduler, [fake])
        for job in scheduler.schedule():
            advance(job, [7])
            ended: Any = job.sequence
            if len(ended.tokens) >= ends[ended.number]:
                ended.is_served = True
                scheduler.remove(ended)
                latencies.append(now - ended.arrived)
        if not arrivals and not scheduler.has_work:
            break
    assert len(latencies) == 400
    return float(np.mean(latencies)), max(latencies)


def test_predicted_lengths_shorten_the_mean_wait_and_starve_nobody() -> None:
    (fcfs, longest), (predicted, longest_predicted) = map(mean_latency, ("fcfs", "predicted"))
    assert predicted < 0.8 * fcfs, (fcfs, predicted)
    assert longest_predicted < 1.2 * longest, (longest, longest_predicted)


def test_who_was_let_in_unlearnt_is_predicted_again_when_more_is_known() -> None:
    scheduler = scheduler_with(BlockAllocator(99, 4), scheduling_policy="predicted", max_num_seqs=1)
    shorts = fakes(*[(2, 9)] * 8)
    long, short = Fake([1] * 20, 100, 20, 0), Fake([2, 3], 110, 21, 0)
    queue(scheduler, [*shorts, long, short])
    assert numbers(scheduler.waiting)[-2:] == [20, 21]
    while not all(each.is_served for each in shorts):
        scheduler._lengths.learn(20, 60)
        step(scheduler)
    scheduler.schedule()
    assert numbers(scheduler.running) == [21], "as short as the others like it"
