"""The K and V pages of one model: write new tokens, keep an accepted path."""

import torch
from torch import Tensor


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
        # Not zeros: memory is touched as requests touch it, and no one reads what no one wrote.
        self.num_slots = num_slots
        shape = (num_layers, 2, kv_heads, num_slots, head_dim)
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
