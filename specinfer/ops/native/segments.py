"""A step's segments as the native kernels read them, and attention by itself."""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.ops.attention import Segment
from specinfer.ops.native import kernels


class SegmentTable:
    """Segments under one window, field by field as attention.h has them.

    address  of the first; good for as long as the table lives
    """

    def __init__(self, segments: Sequence[Segment], window: int | None) -> None:
        self._kept: list[npt.NDArray[np.generic]] = []  # what addresses in the table belong to
        self._table = array("q")
        for segment in segments:
            self._table.extend(self._row(segment, window))
        self.address, _ = self._table.buffer_info()

    def _row(self, segment: Segment, window: int | None) -> tuple[int, ...]:
        slots, start, mask, first = 0, 0, 0, 0
        # Addresses say nothing of lengths.
        if isinstance(segment.slots, slice):
            start = segment.slots.start
            assert segment.slots.stop - start == segment.num_keys
        else:
            assert len(segment.slots) == segment.num_keys
            slots = self._keep(np.ascontiguousarray(segment.slots, np.int64))
        seen = segment.mask
        if window is not None and segment.is_cut(window):
            queries = np.asarray(segment.query_positions, np.int64)
            # Of a chain keys stand at their positions. Of a tree the prefix does, at least.
            firsts = np.maximum(queries - window + 1, 0)
            if seen is not None:
                region = np.asarray(segment.region_positions, np.int64)
                seen = seen & (np.subtract.outer(queries, region) < window)
                firsts = np.minimum(firsts, segment.prefix)
            first = self._keep(firsts)
        if seen is not None:
            assert seen.shape == (segment.num_queries, segment.num_keys - segment.prefix)
            mask = self._keep(np.ascontiguousarray(seen, np.bool_))
        return segment.num_queries, segment.num_keys, segment.prefix, slots, start, mask, first

    def _keep(self, array: npt.NDArray[np.generic]) -> int:
        self._kept.append(array)
        return array.ctypes.data


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`ops.attention.attention_reference` by our kernel: see `can_attend`.

    error  2e-6 in float32, one rounding of the result in bfloat16; a node's result is the same bits
           in every tree, chunk and batch
    """
    found = kernels()
    assert found is not None
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    table = SegmentTable(segments, window)
    found.attend(
        *(table.address, len(segments), q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr()),
        *(
            out.data_ptr(),
            q.shape[1],
            k_pages.shape[0],
            q.shape[2],
            k_pages.stride(0) // q.shape[2],
        ),
        *(scale, q.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    return out
