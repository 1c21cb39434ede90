"""Model-free: blocks under random traffic; blocks in use = blocks owned after every call."""

import itertools
from typing import Any

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


def taken(allocator: BlockAllocator, num_tokens: int, **options: Any) -> Pages:
    pages = allocator.allocate(num_tokens, **options)
    assert pages is not None
    return pages


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
        assert pages.is_run == has_run(free, count)
        held.append(pages)
    for pages in held:
        allocator.free(pages)
    assert allocator.num_free == num_blocks


@pytest.mark.parametrize("blocks", [(3, 4, 5), (5, 1, 3), (0,)])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_slots_are_where_each_key_is(blocks: tuple[int, ...], block_size: int) -> None:
    steps = [b - a == 1 for a, b in itertools.pairwise(blocks)]
    num_run = block_size * (1 + len([*itertools.takewhile(bool, steps)]))
    pages = Pages(blocks, block_size)
    keys = [pages.slot(key) for key in range(pages.capacity)]
    assert keys == [b * block_size + offset for b in blocks for offset in range(block_size)]
    everything = np.arange(100)
    for start in range(pages.capacity + 1):
        for stop in range(start, pages.capacity + 1):
            slots = pages.slots(start, stop)
            assert isinstance(slots, slice) == (stop <= num_run)
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
    pages = taken(allocator, 20)
    allocator.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)


def test_scattered_blocks_are_used_where_no_run_is_free() -> None:
    allocator = BlockAllocator(5, 2)
    pages = [allocator.allocate(2) for _ in range(5)]
    for each in pages:
        assert each is not None
        if each.blocks[0] % 2 == 0:
            allocator.free(each)
    scattered = allocator.allocate(6)
    assert scattered is not None
    assert sorted(scattered.blocks) == [0, 2, 4]
    assert not scattered.is_run


# --- growing --------------------------------------------------------------------------------------


def test_pages_grow_next_to_their_last_block() -> None:
    """As many as were made room for, in turns, each stays one run."""
    allocator = BlockAllocator(64, 4)
    pages = [taken(allocator, 4, room=64) for _ in range(4)]
    for num_tokens in range(4, 65, 4):
        for each in pages:
            assert allocator.extend(each, num_tokens)
            assert each.is_run
    assert allocator.num_free == 0
    assert not allocator.extend(pages[0], 65)
    assert pages[0].capacity == 64


def test_who_has_no_room_of_its_own_is_placed_where_it_disturbs_least() -> None:
    """More may come than there is: each starts in the middle of the longest run."""
    allocator = BlockAllocator(64, 4)
    pages = [taken(allocator, 4, room=1000) for _ in range(4)]
    for num_tokens in range(4, 50, 4):
        for each in pages:
            assert allocator.extend(each, num_tokens)
    assert [each.is_run for each in pages] == [True] * 4


def test_a_run_is_read_as_one_though_something_lies_behind_it() -> None:
    pages = Pages((3, 4, 7), 2)
    assert pages.slots(1, 4) == slice(7, 10)
    assert pages.slots(1, 5).tolist() == [7, 8, 9, 14]  # type: ignore[union-attr]
    assert pages.cut(2) == [7]
    assert pages.is_run
    pages.append([5])
    assert pages.slots(0, 6) == slice(6, 12)


def test_trimming_gives_back_what_a_tree_was_lent() -> None:
    allocator = BlockAllocator(8, 4)
    pages = taken(allocator, 7)
    assert allocator.extend(pages, 30)
    assert allocator.num_free == 0
    allocator.trim(pages, 7)
    assert (len(pages.blocks), allocator.num_free) == (2, 6)


# --- sharing --------------------------------------------------------------------------------------


def hashes_of(allocator: BlockAllocator, tokens: list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    allocator.hash_blocks(hashes, tokens, len(tokens), salt)
    return hashes


def served(allocator: BlockAllocator, tokens: list[int], shared: int = 0) -> list[int]:
    """The blocks of a text that came and went."""
    hashes = hashes_of(allocator, tokens)
    pages = taken(allocator, len(tokens), shared=allocator.find(hashes[:shared]))
    assert len(pages.contents) == shared
    allocator.publish(pages, hashes)
    allocator.free(pages)
    return pages.blocks


def test_a_hash_is_of_all_text_before_it() -> None:
    allocator = BlockAllocator(8, 2)
    one, two = hashes_of(allocator, [1, 2, 3, 4, 5]), hashes_of(allocator, [9, 2, 3, 4])
    assert len(one) == len(two) == 2
    assert len({*one, *two, *hashes_of(allocator, [1, 2, 3, 4], b"salt")}) == 6
    longer = one[:1]
    allocator.hash_blocks(longer, [1, 2, 3, 4, 6, 7], 6)
    assert longer[:2] == one
    assert len(longer) == 3


def test_what_is_published_is_found_and_shared() -> None:
    allocator = BlockAllocator(8, 2)
    text = [1, 2, 3, 4, 5, 6]
    hashes, other = hashes_of(allocator, text), hashes_of(allocator, [1, 2, 3, 4, 9, 9])
    assert allocator.find(hashes) == []
    first = taken(allocator, 7)
    allocator.publish(first, hashes[:2])
    assert allocator.find(other) == first.blocks[:2]
    second = taken(allocator, 7, shared=allocator.find(other))
    assert second.blocks[:2] == first.blocks[:2]
    assert second.contents == first.contents
    assert allocator.num_free == 8 - 4 - 2
    allocator.free(first)
    assert allocator.num_free == 4
    assert allocator.find(hashes) == first.blocks[:2], "still there, and still somebody's"
    allocator.free(second)
    assert allocator.num_free == 8
    assert allocator.find(hashes) == first.blocks[:2], "nobody's and kept"
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(second)


def test_of_two_equal_blocks_the_first_is_shared() -> None:
    allocator = BlockAllocator(8, 2)
    hashes = hashes_of(allocator, [1, 2, 3, 4])
    first, second = taken(allocator, 4), taken(allocator, 4)
    allocator.publish(first, hashes[:1])
    allocator.publish(second, hashes)
    assert second.contents[0] == 0
    assert allocator.find(hashes) == [first.blocks[0], second.blocks[1]]
    allocator.free(first)
    allocator.free(second)
    assert allocator.num_free == 8
    assert allocator.find(hashes) == [first.blocks[0], second.blocks[1]]


def test_the_longest_unused_is_evicted_and_of_a_text_the_end() -> None:
    allocator = BlockAllocator(6, 2)
    old, new = [1, 1, 2, 2, 3, 3], [4, 4, 5, 5]
    served(allocator, old)
    served(allocator, new)
    assert served(allocator, old[:4], shared=2), "used again: now the latest"
    assert allocator.num_free == 6
    found = []
    held = []
    for _ in range(6):
        held.append(taken(allocator, 2))
        found.append([len(allocator.find(hashes_of(allocator, text))) for text in (old, new)])
    assert found == [[3, 2], [2, 2], [2, 1], [2, 0], [1, 0], [0, 0]]
    assert allocator.num_free == 0


def test_shared_blocks_count_as_taken() -> None:
    """What is kept is free until somebody takes it, and not twice."""
    allocator = BlockAllocator(4, 2)
    text = [1, 1, 2, 2, 3, 3]
    served(allocator, text)
    shared = allocator.find(hashes_of(allocator, text))
    assert allocator.allocate(10, shared) is None
    assert allocator.allocate(8, shared, spare=1) is None
    assert allocator.num_free == 4
    pages = taken(allocator, 8, shared=shared)
    assert allocator.num_free == 0
    assert pages.blocks[:3] == shared


def test_a_next_turn_continues_the_run_of_the_last() -> None:
    allocator = BlockAllocator(32, 2)
    first = taken(allocator, 9, room=20)
    hashes = hashes_of(allocator, list(range(9)))
    allocator.publish(first, hashes)
    allocator.free(first)
    second = taken(allocator, 14, shared=allocator.find(hashes), room=30)
    assert second.is_run
    assert second.blocks[:4] == first.blocks[:4]


def test_contents_are_never_numbered_alike() -> None:
    allocator = BlockAllocator(2, 2)
    seen = set()
    for text in ([1, 1, 2, 2], [3, 3, 4, 4], [1, 1, 2, 2], [1, 1, 2, 2]):
        hashes = hashes_of(allocator, text)
        pages = taken(allocator, 4)
        allocator.publish(pages, hashes)
        assert not seen & set(pages.contents)
        seen |= set(pages.contents)
        allocator.free(pages)
        allocator.reset()
        assert allocator.find(hashes) == []
        assert allocator.num_free == 2
