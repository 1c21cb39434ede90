"""The K and V pages of one model: write new tokens, keep an accepted path."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from specinfer.errors import CapacityError


class KVPool:
    """K and V of every layer by slot: [layers, 2, kv_heads, slots, head_dim].

    Head-major, so that one head's keys are one run of memory; one tensor, so that keeping an
    accepted path is one gather and one scatter for all layers.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        kv_heads: int,
        num_slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for so many slots; a processor's memory is taken as requests touch it.

        raises  CapacityError where the system refuses so much
        """
        self.num_slots = num_slots
        shape = (num_layers, 2, kv_heads, num_slots, head_dim)
        if device.type == "cpu":
            self._pages = _untouched(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        else:  # no one reads what no one wrote
            self._pages = torch.empty(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._pages]

    @staticmethod
    def bytes_per_slot(*, num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token takes."""
        return num_layers * 2 * kv_heads * head_dim * dtype.itemsize

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, [kv_heads, slots, head_dim] each."""
        return self._layers[layer]

    def write(self, layer: int, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Store new tokens' K and V, [tokens, kv_heads, head_dim] each, at their slots."""
        k_pages, v_pages = self._layers[layer]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if isinstance(slots, slice):
            k_pages[:, slots] = k
            v_pages[:, slots] = v
        else:
            k_pages.index_copy_(1, slots, k)
            v_pages.index_copy_(1, slots, v)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy slots to slots in every layer at once: all are read before any is written."""
        if sources:
            slots = torch.tensor([sources, targets])
            source, target = slots.to(self._pages.device, non_blocking=True)
            self._pages.index_copy_(3, target, self._pages.index_select(3, source))


def _untouched(num_bytes: int) -> Tensor:
    """Memory of which only what is written becomes resident, in pages of a few KB.

    Torch's own stands in huge pages, of which each spans several heads' runs: 16 tokens of a model
    of 0.3B made 254 MiB resident instead of 1. They gain a step 0 to 3 % behind 1,900 tokens, and
    nothing that could be measured behind 512.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"{num_bytes} bytes for K and V could not be had ({error}): lower kv_cache_memory"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # where the system gives huge pages unasked
        with suppress(OSError):  # a kernel made without them refuses the word
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
