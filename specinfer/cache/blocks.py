"""Which blocks of the cache belong to whom: counting without a tensor.

A block holds `block_size` tokens in *every* model's pool: the target and the drafters share block
numbers, so a request's place is accounted for once, whatever number of models serve it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """One request's blocks, in order. Key i stands at slot `blocks[i // size] * size + i % size`.

    first  the first slot where the blocks are one run, else None: a run is read without gathering
    """

    blocks: tuple[int, ...]
    block_size: int
    first: int | None

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return len(self.blocks) * self.block_size

    def slots(self, start: int, stop: int) -> slice | npt.NDArray[np.int64]:
        """The slots of keys start … stop - 1: a slice where the blocks are one run."""
        assert 0 <= start <= stop <= self.capacity
        if self.first is not None:
            return slice(self.first + start, self.first + stop)
        keys = np.arange(start, stop)
        blocks = np.asarray(self.blocks, np.int64)
        return blocks[keys // self.block_size] * self.block_size + keys % self.block_size

    def slot(self, key: int) -> int:
        """The slot of one key."""
        return self.blocks[key // self.block_size] * self.block_size + key % self.block_size


class BlockAllocator:
    """Hands out blocks 0 … num_blocks - 1: one run where one is free, else whichever are free."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self._free = bytearray(b"\x01" * num_blocks)  # 1: free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> Pages | None:
        """Pages for so many tokens; None, and nothing taken, where too few blocks are free."""
        count = self.blocks_for(num_tokens)
        if count > self.num_free:
            return None
        start = self._free.find(b"\x01" * count)
        if start >= 0:
            blocks = tuple(range(start, start + count))
        else:
            blocks = tuple(np.flatnonzero(np.frombuffer(self._free, np.uint8))[:count].tolist())
        for block in blocks:
            self._free[block] = 0
        self.num_free -= count
        return Pages(blocks, self.block_size, start * self.block_size if start >= 0 else None)

    def free(self, pages: Pages) -> None:
        """Give a request's blocks back."""
        for block in pages.blocks:
            assert not self._free[block], f"block {block} is freed twice"
            self._free[block] = 1
        self.num_free += len(pages.blocks)
