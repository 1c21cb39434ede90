"""Model-free: scheduler, blocks and drafters' notes under random traffic, by hypothesis.

K and V are modelled by the text they were computed of (`PathPool`), so a key that was overwritten,
shared too early or kept for another text is seen by the first sequence that reads it.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from specinfer.draft.base import Draft
from specinfer.draft.model import ModelDrafter
from specinfer.engine.scheduler import Job
from specinfer.run.batch import Span
from specinfer.tree import TokenTree
from tests.traffic import Fake, PathPool, StrictAllocator, Texts, advance, scheduler_with

VOCAB = 3
COUNTS = {"events": 0, "preempted": 0, "hits": 0, "evicted": 0, "adopted": 0, "moved": 0}
"""What happened in all examples together: else nothing is shown."""


class Traffic(RuleBasedStateMachine):
    """Sequences arrive, grow along accepted paths, end, are aborted, and steps fail."""

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.integers(1, 4),
        seed=st.integers(0, 2**16),
        options=st.fixed_dictionaries(
            {
                "max_num_seqs": st.integers(1, 5),
                "max_num_batched_tokens": st.integers(1, 30),
                "chunked_prefill_size": st.integers(1, 12),
                "enable_prefix_caching": st.sampled_from([True, True, True, False]),
                "scheduling_policy": st.sampled_from(["fcfs", "priority", "predicted"]),
            }
        ),
    )
    def start(self, num_blocks: int, block_size: int, seed: int, options: dict[str, Any]) -> None:
        self.rng = np.random.default_rng(seed)
        self.options = options
        self.has_priorities = options["scheduling_policy"] == "priority"
        self.allocator = StrictAllocator(num_blocks, block_size)
        self.scheduler = scheduler_with(self.allocator, **options)
        self.stats = self.scheduler._stats
        self.texts = Texts()
        self.target = PathPool(self.texts, VOCAB)
        self.drafting = PathPool(self.texts, VOCAB)
        self.drafter = ModelDrafter("fake", self.drafting, vocab_size=VOCAB, max_tokens=9)  # type: ignore[arg-type]
        self.live: list[Fake] = []
        self.num_added = 0
        self.named: dict[bytes, list[int]] = {}  # hash -> its text
        room = num_blocks * block_size
        self.beginnings = [self.random_tokens(room) for _ in range(2)]

    def random_tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, VOCAB, count).tolist()

    # --- events -----------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def arrive(self, count: int) -> None:
        """What it is like is left to chance: hypothesis prefers small numbers to crowded pages."""
        for _ in range(count if len(self.live) < 9 else 0):
            draw, room = self.rng.integers, self.allocator.num_blocks * self.allocator.block_size
            max_nodes = int(draw(0, min(6, room - 2) + 1))
            max_total = room - max_nodes - int(draw(0, room - max_nodes - 1)) // int(draw(1, 4))
            longest = min(max_total - 1, int(self.rng.choice([3, 9, room])))
            common = int(draw(0, longest + 1))
            tokens = [*self.beginnings[draw(2)][:common], *self.random_tokens(int(draw(1, 4)))]
            fake = Fake(tokens[: max_total - 1], max_total, self.num_added, max_nodes)
            fake.salt = b"other" if self.rng.random() < 0.1 else b""
            fake.reads_cache = bool(self.rng.random() < 0.9)
            fake.priority = int(draw(-1, 2)) if self.has_priorities else 0
            self.num_added += 1
            self.scheduler.add(fake)  # type: ignore[arg-type]
            self.live.append(fake)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.rng.random() < 0.5:
            return
        self.remove(self.live[data.draw(st.integers(0, len(self.live) - 1))])

    @rule()
    def fail(self) -> None:
        """A step that fails on its way: nothing of it may be read afterwards."""
        if self.rng.random() < 0.8:
            return
        for job in self.scheduler.schedule():
            for key in range(job.sequence.num_computed, len(job.sequence.tokens) + job.max_nodes):
                assert job.sequence.pages is not None
                self.target.kept[job.sequence.pages.slot(key)] = ("broken",)
        for ended in self.scheduler.clear():
            self.drafter.drop(ended.number)
            self.live.remove(ended)  # type: ignore[arg-type]
        self.note_names()

    @rule(steps=st.integers(1, 6))
    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.check()

    def step(self) -> list[Job]:
        num_preempted = self.stats.num_preemptions
        jobs = self.scheduler.schedule()
        assert bool(jobs) == self.scheduler.has_work, "there was work and nothing was scheduled"
        self.check_shares(jobs)
        for fake in self.live:
            if fake.pages is not None:
                self.target.owners[id(fake.pages)] = fake.tokens
                self.drafting.owners[id(fake.pages)] = fake.tokens
        trees = self.draft(jobs)
        spans = [self.span(job, trees.get(job.sequence.number)) for job in jobs]
        self.refuse_overwriting(spans)
        self.target.run(spans)
        for job in jobs:
            self.commit(job, trees)
        COUNTS["preempted"] += self.stats.num_preemptions - num_preempted
        return jobs

    def draft(self, jobs: list[Job]) -> dict[int, tuple[Draft, int]]:
        """A tree per sequence by a real `ModelDrafter`: its root, and one level below."""
        trees, frontier = {}, []
        for job in jobs:
            sequence = job.sequence
            if job.max_nodes and self.rng.random() < 0.7:  # else the drafter falls behind
                assert sequence.pages is not None
                tree = TokenTree(sequence.tokens[-1])
                draft = Draft(sequence.number, sequence.tokens, sequence.pages, tree)
                trees[sequence.number] = draft, job.max_nodes
                frontier.append((draft, [0]))
        if not frontier:
            return {}
        before = self.drafting.num_computed
        self.drafter.expand(frontier)
        fed = self.drafting.num_computed - before
        COUNTS["adopted"] += sum(len(draft.tokens) for draft, _ in frontier) - fed
        deeper = []
        for draft, max_nodes in trees.values():
            width = int(self.rng.integers(1, min(max_nodes, VOCAB) + 1))
            for token in self.rng.permutation(VOCAB)[:width].tolist():
                draft.tree.add(0, token)
            nodes = sorted(self.rng.permutation(np.arange(1, width + 1))[: width // 2 + 1].tolist())
            for token in range(max_nodes - width)[:VOCAB]:
                draft.tree.add(nodes[0], token)
            if len(draft.tree) > width + 1:
                deeper.append((draft, nodes))
        if deeper:
            self.drafter.expand(deeper)
        return trees

    def span(self, job: Job, drafted: tuple[Draft, int] | None) -> Span:
        """As `Work.span` makes it."""
        sequence = job.sequence
        tree = TokenTree(sequence.tokens[-1]) if drafted is None else drafted[0].tree
        assert len(tree) - 1 <= job.max_nodes
        start, stop = sequence.num_computed, sequence.num_computed + job.num_tokens
        assert sequence.pages is not None
        return Span(
            tokens=[*sequence.tokens[start:stop], *tree.tokens[1:]],
            positions=[*range(start, stop - 1), *(stop - 1 + depth for depth in tree.depths)],
            pages=sequence.pages,
            prefix=start,
            start=start,
            mask=None if len(tree) == 1 else tree.ancestor_mask(),
            num_logits=1,
        )

    def commit(self, job: Job, trees: dict[int, tuple[Draft, int]]) -> None:
        """Accept a random path and one token more, keep K and V as the engine does."""
        fake: Fake = job.sequence  # type: ignore[assignment]
        if not job.emits:
            advance(job)
            return
        path: list[int] = []
        assert fake.pages is not None
        if fake.number in trees:
            draft, _ = trees[fake.number]
            nodes = [n for n in range(len(draft.tree)) if draft.tree.depths[n] < fake.num_left]
            node = int(self.rng.choice(nodes))
            path = draft.tree.path(node)
            root = len(fake.tokens) - 1
            moves = [(n, d) for d, n in enumerate(path, start=1) if n != d]
            self.target.move(
                [fake.pages.slot(root + n) for n, _ in moves],
                [fake.pages.slot(root + d) for _, d in moves],
            )
            COUNTS["moved"] += len(moves)
            self.drafter.admit([(draft, path)])
            new = [draft.tree.tokens[n] for n in path]
        else:
            new = []
        num_known = len(fake.tokens)
        advance(job, [*new, *self.random_tokens(1)])
        if fake.num_left <= 0 or self.rng.random() < 0.05:
            # Some end inside the path: what is computed is then more than what is known.
            if path and self.rng.random() < 0.5:
                del fake.tokens[num_known + 1 :]
            fake.is_served = True
            self.remove(fake)

    def remove(self, fake: Fake) -> None:
        self.scheduler.remove(fake)  # type: ignore[arg-type]
        self.drafter.drop(fake.number)
        self.live.remove(fake)
        assert fake.pages is None
        self.note_names(fake)

    # --- what must hold ---------------------------------------------------------------------------

    def check_shares(self, jobs: list[Job]) -> None:
        options = self.options
        assert len({id(job.sequence) for job in jobs}) == len(jobs) <= options["max_num_seqs"]
        num_tokens = sum(job.num_tokens + job.max_nodes for job in jobs)
        assert num_tokens <= options["max_num_batched_tokens"]
        for job in jobs:
            sequence = job.sequence
            assert 1 <= job.num_tokens <= sequence.num_pending
            assert job.emits == (job.num_tokens == sequence.num_pending)
            assert 0 <= job.max_nodes <= (sequence.max_nodes if sequence.num_pending == 1 else 0)
            assert sequence.pages is not None
            assert sequence.pages.capacity >= len(sequence.tokens) + job.max_nodes

    def refuse_overwriting(self, spans: list[Span]) -> None:
        """A published block is written once, by the step that published it."""
        for span in spans:
            size = span.pages.block_size
            for key in range(span.start, span.start + len(span.tokens)):
                index = key // size
                if index < len(span.pages.contents) and span.pages.contents[index]:
                    place = span.pages.contents[index], key % size
                    assert place not in self.written, "a shared block is written again"
                    self.written.add(place)

    written: set[tuple[int, int]]

    def note_names(self, *ended: Fake) -> None:
        for fake in (*self.live, *ended):
            size = self.allocator.block_size
            for index, name in enumerate(fake.hashes):
                text = fake.tokens[: (index + 1) * size]
                if len(text) == (index + 1) * size:
                    assert self.named.setdefault(name, text) == text

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "live"):
            return
        COUNTS["events"] += 1
        running: list[Fake] = self.scheduler.running  # type: ignore[assignment]
        waiting: list[Fake] = self.scheduler.waiting  # type: ignore[assignment]
        assert {id(f) for f in running} | {id(f) for f in waiting} == {id(f) for f in self.live}
        assert len(running) + len(waiting) == len(self.live)
        assert all(fake.pages is not None for fake in running)
        assert all(fake.pages is None and fake.num_computed == 0 for fake in waiting)
        assert waiting == sorted(waiting, key=lambda fake: (fake.due, fake.number))
        self.allocator.check([fake.pages for fake in running if fake.pages is not None])
        assert self.stats.num_blocks_used == self.allocator.num_blocks - self.allocator.num_free
        assert (self.stats.num_running, self.stats.num_waiting) == (len(running), len(waiting))
        self.note_names()
        for name, block in self.allocator._block_of.items():
            paths = self.texts.of(self.named[name])[-self.allocator.block_size :]
            first = block * self.allocator.block_size
            held = [self.target.kept[first + key] for key in range(len(paths))]
            assert all(a is b for a, b in zip(held, paths, strict=True)), "not what its hash says"

    def teardown(self) -> None:
        """Whoever is left comes to an end: nobody waits for ever."""
        if not hasattr(self, "live"):
            return
        limit = 10 + 2 * sum(fake.max_total + 1 for fake in self.live)
        for _ in range(limit):
            if not self.live:
                break
            self.step()
            self.check()
        assert not self.live, "some sequence starves"
        assert self.allocator.num_free == self.allocator.num_blocks
        assert not self.drafter._states
        COUNTS["hits"] += self.stats.num_prefix_hits
        COUNTS["evicted"] += getattr(self.allocator, "num_evicted", 0)

    def __init__(self) -> None:
        super().__init__()
        self.written = set()


def run(num_examples: int, num_steps: int) -> dict[str, int]:
    before = dict(COUNTS)
    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return {name: COUNTS[name] - before[name] for name in COUNTS}


def test_random_traffic() -> None:
    happened = run(num_examples=120, num_steps=30)
    assert min(happened.values()) > 20, happened


@pytest.mark.slow
def test_random_traffic_for_long() -> None:
    happened = run(num_examples=1500, num_steps=60)
    assert happened["events"] >= 100_000, happened
    assert min(happened.values()) > 1000, happened
