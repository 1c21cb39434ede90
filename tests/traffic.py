"""What the model-free tests share: sequences that only count, pages that say what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specinfer.cache.blocks import BlockAllocator, Pages
from specinfer.config import EngineConfig
from specinfer.engine.scheduler import Job, Scheduler
from specinfer.engine.stats import EngineStats
from specinfer.outputs import RequestStats
from specinfer.run.batch import Span

Path = tuple[Any, ...] | None
"""A text as (text before, last token), so that equal texts are compared in one look."""


@dataclass(eq=False)
class Fake:
    """What the scheduler sees of a sequence."""

    tokens: list[int]
    max_total: int
    number: int = 0
    max_nodes: int = 12
    priority: int = 0
    salt: bytes = b""
    reads_cache: bool = True
    num_computed: int = 0
    is_served: bool = False
    pages: Pages | None = None
    arrival: int = 0
    due: float = 0.0
    hashes: list[bytes] = field(default_factory=list)
    stats: RequestStats = field(default_factory=RequestStats)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        return self.max_total - len(self.tokens)


class Texts:
    """Every text once, so that two are equal where they are the same object."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Path] = {}

    def after(self, before: Path, token: int) -> Path:
        return self._known.setdefault((id(before), token), (before, token))

    def of(self, tokens: Sequence[int]) -> list[Path]:
        """The texts that end with each token."""
        paths, path = [], None
        for token in tokens:
            path = self.after(path, token)
            paths.append(path)
        return paths


class PathPool:
    """A model and its pages, where K and V at a slot are the text that was seen by who wrote them.

    It is a `Runner` and its `KVPool` for who runs spans. Every key that a span sees must be of the
    text that its owner has; `texts` says by pages which that is.
    """

    def __init__(self, texts: Texts, vocab_size: int) -> None:
        self.kept: dict[int, Path] = {}
        self.texts = texts
        self.owners: dict[int, list[int]] = {}  # id of pages -> tokens
        self.vocab_size = vocab_size
        self.pool = self
        self.runs_levels = False
        self.decoder = SimpleNamespace(
            architecture=SimpleNamespace(max_position_embeddings=1 << 30)
        )
        self.num_computed = 0

    def run(self, spans: Sequence[Span]) -> Tensor:
        """As a model does it: first all are written, then all are read."""
        for span in spans:
            self._write(span)
        for span in spans:
            self._read(span)
        self.num_computed += sum(len(span.tokens) for span in spans)
        return torch.zeros(sum(span.num_logits for span in spans), self.vocab_size)

    def move(self, sources: list[int], targets: list[int]) -> None:
        held = [self.kept[slot] for slot in sources]
        self.kept.update(zip(targets, held, strict=True))

    def _write(self, span: Span) -> None:
        before = self.kept[span.pages.slot(span.prefix - 1)] if span.prefix else None
        region: list[Path] = [self.kept[span.pages.slot(k)] for k in range(span.prefix, span.start)]
        for row, token in enumerate(span.tokens):
            column = row - 1
            if span.mask is not None:
                seen = [c for c, sees in enumerate(span.mask[row]) if sees and c != len(region)]
                column = seen[-1] if seen else -1
            region.append(self.texts.after(region[column] if column >= 0 else before, token))
            self.kept[span.pages.slot(span.start + row)] = region[-1]

    def _read(self, span: Span) -> None:
        expected = self.texts.of(self.owners[id(span.pages)])
        before: Path = None
        for key in range(span.prefix):
            held = self.kept[span.pages.slot(key)]
            if key < len(expected):
                assert held is expected[key], f"key {key} is of another text"
            else:  # a node of this step, in a chain of them
                assert held is not None
                assert held[0] is before, f"key {key} is of another node"
            before = held


class StrictAllocator(BlockAllocator):
    """Checks that whoever is evicted has been unused for longest."""

    def reset(self) -> None:
        super().reset()
        self.released: list[int] = []  # kept blocks, in the order in which they were let go

    def _release(self, blocks: Sequence[int]) -> None:
        super()._release(blocks)
        let_go = [block for block in reversed(blocks) if block in self._kept]
        self.released = [block for block in self.released if block not in let_go] + let_go

    def _evict(self, count: int) -> None:
        before = set(self._kept)
        order = [block for block in self.released if block in before]
        super()._evict(count)
        evicted = before - set(self._kept)
        assert len(evicted) >= min(count, len(before))
        assert evicted == set(order[: len(evicted)])
        self.num_evicted = getattr(self, "num_evicted", 0) + len(evicted)

    def check(self, held: Sequence[Pages]) -> None:
        """References are counted exactly, and every block is blank, kept or somebody's."""
        references = [0] * self.num_blocks
        for pages in held:
            assert len(set(pages.blocks)) == len(pages.blocks)
            for block in pages.blocks:
                references[block] += 1
        assert references == self._references
        owned = {block for block, count in enumerate(references) if count}
        blank = {block for block, is_blank in enumerate(self._blank) if is_blank}
        assert not owned & (blank | set(self._kept))
        assert len(owned) + len(blank) + len(self._kept) == self.num_blocks
        assert self.num_free == self.num_blocks - len(owned)
        assert {self._block_of[text]: text for text in self._block_of} == self._hash_of
        published = {block for block, content in enumerate(self._contents) if content}
        assert published == set(self._hash_of)
        assert set(self._kept) <= published <= owned | set(self._kept)
        for pages in held:
            assert pages.contents == [
                self._contents[b] for b in pages.blocks[: len(pages.contents)]
            ]
        contents = [content for content in self._contents if content]
        assert len(set(contents)) == len(contents)


def scheduler_with(allocator: BlockAllocator, **options: Any) -> Scheduler:
    """A scheduler with these limits."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 99} | options
    return Scheduler(allocator, EngineConfig(**options), EngineStats())


def advance(job: Job, new: Sequence[int] = ()) -> None:
    """Compute; where logits are due, the accepted tokens are known and computed but the last."""
    sequence = job.sequence
    sequence.num_computed += job.num_tokens
    if job.emits and new:
        sequence.tokens.extend(new)
        sequence.num_computed += len(new) - 1
