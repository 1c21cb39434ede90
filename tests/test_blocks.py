"""Model-free: blocks under random traffic; blocks in use = blocks owned after every call."""

import itertools

import numpy as np
import pytest

from specinfer.cache.blocks import BlockAllocator, Pages


def free_blocks(num_blocks: int, held: list[Pages]) -> list[int]:
    owned = [block for pages in held for block in pages.blocks]
    assert len(owned) == len(set(owned)), "a block has two owners"
    assert all(0 <= block < num_blocks for block in owned)
    return sorted(set(range(num_blocks)) - set(owned))


def has_run(free: list[int], length: int) -> bool:
    return any(free[i + length - 1] - free[i] == length - 1 for i in range(len(free) - length + 1))


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_blocks, block_size = int(rng.integers(1, 40)), int(rng.integers(1, 9))
    allocator = BlockAllocator(num_blocks, block_size)
    held: list[Pages] = []
    for _ in range(200):
        free = free_blocks(num_blocks, held)
        assert allocator.num_free == len(free)
        if held and rng.random() < 0.5:
            allocator.free(held.pop(int(rng.integers(len(held)))))
            continue
        num_tokens = int(rng.integers(1, num_blocks * block_size + 2))
        count = allocator.blocks_for(num_tokens)
        assert (count - 1) * block_size < num_tokens <= count * block_size
        pages = allocator.allocate(num_tokens)
        if count > len(free):
            assert pages is None
            assert allocator.num_free == len(free)
            continue
        assert pages is not None
        assert len(pages.blocks) == count
        assert set(pages.blocks) <= set(free)
        assert pages.capacity == count * block_size
        assert (pages.first is not None) == has_run(free, count)
        held.append(pages)
    for pages in held:
        allocator.free(pages)
    assert allocator.num_free == num_blocks


@pytest.mark.parametrize("blocks", [(3, 4, 5), (5, 1, 3), (0,)])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_slots_are_where_each_key_is(blocks: tuple[int, ...], block_size: int) -> None:
    is_run = all(b - a == 1 for a, b in itertools.pairwise(blocks))
    pages = Pages(blocks, block_size, blocks[0] * block_size if is_run else None)
    keys = [pages.slot(key) for key in range(pages.capacity)]
    assert keys == [b * block_size + offset for b in blocks for offset in range(block_size)]
    everything = np.arange(100)
    for start in range(pages.capacity + 1):
        for stop in range(start, pages.capacity + 1):
            slots = pages.slots(start, stop)
            assert isinstance(slots, slice) == is_run
            assert everything[slots].tolist() == keys[start:stop]
    with pytest.raises(AssertionError):
        pages.slots(0, pages.capacity + 1)


def test_a_request_too_big_takes_nothing() -> None:
    allocator = BlockAllocator(4, 16)
    assert allocator.allocate(65) is None
    assert allocator.num_free == 4
    assert allocator.allocate(64) is not None
    assert allocator.allocate(1) is None


def test_blocks_are_not_freed_twice() -> None:
    allocator = BlockAllocator(4, 16)
    pages = allocator.allocate(20)
    assert pages is not None
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)


def test_scattered_blocks_are_used_where_no_run_is_free() -> None:
    allocator = BlockAllocator(5, 2)
    pages = [allocator.allocate(2) for _ in range(5)]
    for index in (0, 2, 4):
        allocator.free(pages[index])  # type: ignore[arg-type]
    scattered = allocator.allocate(6)
    assert scattered is not None
    assert scattered.blocks == (0, 2, 4)
    assert scattered.first is None
