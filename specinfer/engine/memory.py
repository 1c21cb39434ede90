"""How many blocks the cache may have: bytes of a block, bytes that are there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specinfer.cache.pool import KVPool
from specinfer.config import EngineConfig
from specinfer.errors import CapacityError
from specinfer.models.architecture import Architecture

_DEFAULT_SHARE = 0.25
"""Unless told otherwise, pages take at most this part of the free memory."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CacheNeeds:
    """What blocks cost and what they are needed for.

    block_bytes  of one block, in all models' pools together
    most_tokens  that one request may fill, a tree included; least_tokens there must be room for
    """

    config: EngineConfig
    block_bytes: int
    most_tokens: int
    least_tokens: int

    def num_given(self) -> int | None:
        """Blocks in the bytes that were asked for; None where no number was.

        raises  CapacityError where one request would not fit
        """
        given = self.config.kv_cache_bytes
        if given is None:
            return None
        return self._fitting(given, f"kv_cache_memory={self.config.kv_cache_memory}")

    def num_free(self, device: torch.device) -> int:
        """Blocks in the memory that is free now, as much of it as may be taken.

        raises  CapacityError where a part was asked for that one request does not fit into
        """
        share, free = self.config.kv_cache_memory_fraction, free_memory(device)
        if share is not None:
            what = f"kv_cache_memory_fraction={share} is {int(share * free)} bytes, which"
            return self._fitting(int(share * free), what)
        return max(1, min(self._useful, int(_DEFAULT_SHARE * free) // self.block_bytes))

    @property
    def _useful(self) -> int:
        """Blocks that max_num_seqs full requests use."""
        return self._blocks_for(self.most_tokens) * self.config.max_num_seqs

    def _fitting(self, given: int, what: str) -> int:
        num_blocks, size = given // self.block_bytes, self.config.block_size
        least = self._blocks_for(self.least_tokens)
        if num_blocks < least:
            raise CapacityError(
                f"{what} holds {num_blocks * size} tokens and one request may have "
                f"{self.least_tokens}, its tree included: give at least "
                f"{least * self.block_bytes} bytes, or lower max_model_len"
            )
        # What nobody uses now may hold past texts.
        if self.config.enable_prefix_caching:
            return num_blocks
        return min(num_blocks, self._useful)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


def token_bytes(models: Sequence[tuple[Architecture, torch.dtype]]) -> int:
    """Bytes that one token takes in the pools of all these models."""
    return sum(
        KVPool.bytes_per_slot(
            num_layers=architecture.num_layers,
            kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            dtype=dtype,
        )
        for architecture, dtype in models
    )


def free_memory(device: torch.device) -> int:
    """Bytes that could be had now: of the machine, and of the container that this runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is, instead of what is free
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_memory(_CGROUP)
    return free if limit is None else min(free, limit)


def container_memory(folder: Path) -> int | None:
    """Bytes left under a control group's limit; None where there is no limit.

    folder  of the group (version 2); cached files count as free, since they give way
    """
    try:
        limit = int((folder / "memory.max").read_text())  # "max" is none
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = dict(line.partition(" ")[::2] for line in lines)
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None
