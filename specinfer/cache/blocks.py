"""Which blocks of the cache belong to whom: counting without a tensor.

A block holds `block_size` tokens in *every* model's pool: the target and the drafters share block
numbers, so a request's place is accounted for once, whatever number of models serve it.

    blank ──take──> owned ──publish──> shared ──free──> kept ──evict, the oldest first──> blank

A full block of committed text is published under a hash of all text up to its end. From then on
nobody writes to it, and whoever's text begins alike shares it.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import islice

import numpy as np
import numpy.typing as npt

_EVICTED_SHARE = 32
"""One part in this many of all blocks is evicted at once: what one request left is often one run,
and so is what the next one is given."""


class Pages:
    """One request's blocks, in order. Key i stands at slot `blocks[i // size] * size + i % size`.

    contents  of the leading full blocks, each a number that no other content has had or will have,
              0 where the block is not published: drafters tell by it what they have computed
    """

    __slots__ = ("_num_run", "block_size", "blocks", "contents")

    def __init__(self, blocks: Iterable[int], block_size: int) -> None:
        self.blocks: list[int] = []
        self.block_size = block_size
        self.contents: list[int] = []
        self._num_run = 0  # leading blocks that are one run
        self.append(blocks)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return len(self.blocks) * self.block_size

    @property
    def is_run(self) -> bool:
        """Whether the blocks are one run, to be read without gathering."""
        return self._num_run == len(self.blocks)

    def append(self, blocks: Iterable[int]) -> None:
        """Add blocks behind the last."""
        for block in blocks:
            if self.is_run and (not self.blocks or block == self.blocks[-1] + 1):
                self._num_run += 1
            self.blocks.append(block)

    def cut(self, count: int) -> list[int]:
        """Keep so many blocks; returns the others."""
        rest = self.blocks[count:]
        del self.blocks[count:]
        self._num_run = min(self._num_run, count)
        return rest

    def slots(self, start: int, stop: int) -> slice | npt.NDArray[np.int64]:
        """The slots of keys start … stop - 1: a slice where the blocks up to there are one run."""
        assert 0 <= start <= stop <= self.capacity
        size = self.block_size
        if stop <= self._num_run * size:
            first = self.blocks[0] * size if self.blocks else 0
            return slice(first + start, first + stop)
        keys = np.arange(start, stop)
        return np.asarray(self.blocks, np.int64)[keys // size] * size + keys % size

    def slot(self, key: int) -> int:
        """The slot of one key."""
        return self.blocks[key // self.block_size] * self.block_size + key % self.block_size


class BlockAllocator:
    """Hands out blocks 0 … num_blocks - 1, next to each other where it can.

    num_free  blocks that nobody refers to: blank ones, and kept ones that may be evicted
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_contents = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything: nobody may refer to a block any more."""
        self.num_free = self.num_blocks
        self._blank = bytearray(b"\x01" * self.num_blocks)  # 1: blank
        self._references = [0] * self.num_blocks
        self._contents = [0] * self.num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._kept: dict[int, None] = {}  # published, nobody's; the longest unused first

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    # --- taking and giving back -------------------------------------------------------------------

    def allocate(
        self, num_tokens: int, shared: Sequence[int] = (), *, room: int = 0, spare: int = 0
    ) -> Pages | None:
        """Pages for so many tokens; None, and nothing taken, where too few blocks are free.

        shared  published blocks to begin with, as `find` gives them
        room    tokens the request may have one day: it is placed where it can grow
        spare   blocks that have to stay free
        """
        count = self.blocks_for(num_tokens) - len(shared)
        if count + sum(block in self._kept for block in shared) + spare > self.num_free:
            return None
        for block in shared:
            self._refer(block)
        pages = Pages(shared, self.block_size)
        pages.contents = [self._contents[block] for block in shared]
        self._append(pages, count, self.blocks_for(room) - len(shared))
        return pages

    def extend(self, pages: Pages, num_tokens: int) -> bool:
        """Make room for so many tokens in all; False, and nothing taken, where there is none."""
        count = self.blocks_for(num_tokens) - len(pages.blocks)
        if count > self.num_free:
            return False
        self._append(pages, count, count)
        return True

    def trim(self, pages: Pages, num_tokens: int) -> None:
        """Take back the blocks beyond so many tokens."""
        count = self.blocks_for(num_tokens)
        assert count >= len(pages.contents)
        self._release(pages.cut(count))

    def free(self, pages: Pages) -> None:
        """Give a request's blocks back; published ones are kept until they are evicted."""
        self._release(pages.blocks)

    # --- sharing ----------------------------------------------------------------------------------

    def hash_blocks(
        self, hashes: list[bytes], tokens: Sequence[int], stop: int, salt: bytes = b""
    ) -> None:
        """Add what is missing of the hashes of the full blocks among the first `stop` tokens.

        hashes  of the leading blocks, each of all text up to the block's end
        salt    texts of different salts share nothing
        """
        size = self.block_size
        while (len(hashes) + 1) * size <= stop:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sha256(salt).digest()
            hashes.append(sha256(parent + array("q", tokens[start : start + size])).digest())

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest beginning that is there."""
        blocks = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, pages: Pages, hashes: Sequence[bytes]) -> None:
        """Let others share the leading blocks that have these hashes.

        Their K and V are there, or will be before anyone reads them: a step writes all of a
        layer's before it reads any. A block whose text another one holds already stays its owner's.
        """
        for index in range(len(pages.contents), len(hashes)):
            block, text = pages.blocks[index], hashes[index]
            if text not in self._block_of:
                self._num_contents += 1
                self._contents[block] = self._num_contents
                self._hash_of[block] = text
                self._block_of[text] = block
            pages.contents.append(self._contents[block])

    def forget_kept(self) -> None:
        """Make blank what is published and nobody's."""
        if self._kept:
            self._evict(len(self._kept))

    # --- one block --------------------------------------------------------------------------------

    def _refer(self, block: int) -> None:
        if not self._references[block]:
            self.num_free -= 1
            self._kept.pop(block, None)
        self._references[block] += 1

    def _release(self, blocks: Sequence[int]) -> None:
        """Drop a reference each, the last block's first: the end of a text is evicted first."""
        for block in reversed(blocks):
            assert self._references[block], f"block {block} is freed twice"
            self._references[block] -= 1
            if not self._references[block]:
                self.num_free += 1
                if self._contents[block]:
                    self._kept[block] = None
                else:
                    self._blank[block] = 1

    def _append(self, pages: Pages, count: int, room: int) -> None:
        """Add blank blocks, next to the last one as long as they are."""
        if count > self.num_free - len(self._kept):
            self._evict(count - (self.num_free - len(self._kept)))
        while count > 0:
            start = pages.blocks[-1] + 1 if pages.blocks else self.num_blocks
            stop = min(start + count, self.num_blocks)
            taken = self._blank.find(0, start, stop)
            stop = stop if taken < 0 else taken
            if start >= stop:
                start, stop = self._place(count, room)
            self._blank[start:stop] = bytes(stop - start)
            for block in range(start, stop):
                self._refer(block)
            pages.append(range(start, stop))
            count -= stop - start
            room -= stop - start

    def _place(self, count: int, room: int) -> tuple[int, int]:
        """Where to take `count` blocks: in the longest blank run, as far right as `room` allows.

        What stands left of the run may grow into it, so half of it is left to that.
        """
        run = max(self._blank.split(b"\x00"), key=len)
        start, length = self._blank.find(run), len(run)
        room = min(length, max(count, min(room, length if start == 0 else length // 2)))
        begin = start + length - room
        return begin, min(begin + count, start + length)

    def _evict(self, count: int) -> None:
        count = max(count, self.num_blocks // _EVICTED_SHARE)
        for block in list(islice(self._kept, count)):
            del self._kept[block]
            del self._block_of[self._hash_of.pop(block)]
            self._contents[block] = 0
            self._blank[block] = 1
