"""Model-free: the pages hold what was written, and keep an accepted path as a fresh cache would."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from specinfer.cache.blocks import Pages
from specinfer.cache.pool import KVPool
from specinfer.errors import CapacityError

SHAPE = {"num_layers": 3, "kv_heads": 2, "head_dim": 4}


def pool_of(num_slots: int, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(**SHAPE, num_slots=num_slots, dtype=dtype, device=torch.device("cpu"))


def random_kv(num_tokens: int, seed: int) -> torch.Tensor:
    """[layers, 2, tokens, kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, num_tokens, 2, 4, generator=generator)


def write(pool: KVPool, slots: slice | np.ndarray, kv: torch.Tensor) -> None:
    index = slots if isinstance(slots, slice) else torch.from_numpy(slots)
    for layer in range(3):
        pool.write(layer, index, kv[layer, 0], kv[layer, 1])


def read(pool: KVPool, slots: slice | np.ndarray) -> torch.Tensor:
    """What `write` was given."""
    layers = [torch.stack([p[:, slots].transpose(0, 1) for p in pool.layer(n)]) for n in range(3)]
    return torch.stack(layers)


PAGES = {
    "one run": Pages((2, 3, 4), 4),
    "scattered": Pages((5, 0, 3), 4),
}


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
def test_writes_land_in_their_slots_and_nowhere_else(pages: Pages) -> None:
    pool = pool_of(24)
    write(pool, slice(0, 24), torch.zeros_like(random_kv(24, 0)))
    kv = random_kv(12, 0)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        write(pool, pages.slots(start, stop), kv[:, :, start:stop])
    assert torch.equal(read(pool, pages.slots(0, 12)), kv)
    others = np.setdiff1d(np.arange(24), np.arange(24)[pages.slots(0, 12)])
    assert not read(pool, others).any()


@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("path", [[1, 2, 3], [2, 4, 7], [3], [1, 5, 6, 7], []])
def test_keeping_a_path_equals_a_fresh_cache(pages: Pages, path: list[int]) -> None:
    """Keys 0 … 3 are committed, the last one the root; node i stands at key 3 + i."""
    kv = random_kv(12, 1)
    pool = pool_of(24)
    write(pool, pages.slots(0, 12), kv)
    pool.move(
        [pages.slot(3 + node) for node in path],
        [pages.slot(4 + depth) for depth in range(len(path))],
    )
    kept = [0, 1, 2, 3, *(3 + node for node in path)]
    fresh = pool_of(24)
    write(fresh, pages.slots(0, len(kept)), kv[:, :, kept])
    assert torch.equal(
        read(pool, pages.slots(0, len(kept))), read(fresh, pages.slots(0, len(kept)))
    )


@pytest.mark.parametrize("seed", range(10))
def test_moves_read_everything_before_they_write(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool, kv = pool_of(24), random_kv(24, seed)
    write(pool, slice(0, 24), kv)
    count = int(rng.integers(1, 24))
    sources = rng.integers(0, 24, count).tolist()
    targets = rng.permutation(24)[:count].tolist()
    pool.move(sources, targets)
    expected = kv.clone()
    expected[:, :, targets] = kv[:, :, sources]
    assert torch.equal(read(pool, slice(0, 24)), expected)


def test_bytes_per_slot_are_what_the_pages_take() -> None:
    pool = pool_of(10, torch.bfloat16)
    taken = sum(page.numel() * page.element_size() for n in range(3) for page in pool.layer(n))
    assert KVPool.bytes_per_slot(**SHAPE, dtype=torch.bfloat16) * 10 == taken


TAKEN = """
from pathlib import Path
import torch
from specinfer.cache.pool import KVPool

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

cpu = torch.device("cpu")
pool = KVPool(
    num_layers=3, kv_heads=2, head_dim=4, num_slots=1 << 20, dtype=torch.float32, device=cpu
)
before = resident()
for layer in range(3):
    pool.write(layer, slice(1000, 1001), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_taken_as_it_is_written() -> None:
    """A token writes into 12 runs of 16 MiB: a page of each, in huge pages 512 times as many."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEN],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"},  # as where weights were read
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 12 * 512 / 4


def test_more_than_there_is_is_refused() -> None:
    for num_slots in (1 << 50, 1 << 62):
        with pytest.raises(CapacityError, match="lower kv_cache_memory"):
            pool_of(num_slots)


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="needs Linux's madvise")
def test_a_kernel_without_huge_pages_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_NOHUGEPAGE", 9999)  # as unknown there
    assert pool_of(10).num_slots == 10
