"""Dense matrix products with weights packed once at load, for processors.

Ours (`ops/native`) read them in the order in which they are needed: twice as fast as oneDNN at one
row, level with it at many. oneDNN's serve where ours cannot be had.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specinfer.ops.native import NativeRows, NativeWeight, kernels
from specinfer.ops.packed import PackedRows, PackedWeight

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()
# Resolved here because a look-up costs microseconds, and absent where torch is built without it.
_reorder: Any = torch.ops.mkldnn._reorder_linear_weight.default if _HAS_ONEDNN else None
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None
_NO_SCALARS: list[float] = []


STREAMING_ROWS = 6
"""So many rows are multiplied at least by weights that come from memory at each step.

oneDNN's kernels for one to three rows read blocked weights more slowly than the one for six: 19
against 25 GB/s in bfloat16 where memory gave 30 (two Zen 4 cores, 1536 wide), 14 % of a step at the
1B cost. From a cache it is the other way round.
"""


class BlockedWeight(PackedWeight):
    """A weight in oneDNN's blocked layout.

    error  accumulates in float32; differs from a plain product by the order of the sum, so by some
           1e-7 of the row's sum of products in float32 and by one rounding in bfloat16
    """

    def __init__(self, weight: Tensor, *, streamed: bool = False) -> None:
        """Re-order a weight [outputs, inputs].

        streamed  it comes from memory at each step, not from a cache
        """
        self._blocked: Tensor = _reorder(weight)
        self._fewest_rows = STREAMING_ROWS if streamed else 1

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As the base class says; `kernel_rows` are multiplied, zeros below x."""
        rows = x.shape[0]
        size = kernel_rows(rows, self._fewest_rows)
        if size > rows > 0:
            x = F.pad(x, (0, 0, 0, size - rows))
        out: Tensor = _multiply(x, self._blocked, bias, "none", _NO_SCALARS, "")[:rows]
        return out if dtype is None else out.to(dtype)


def kernel_rows(rows: int, fewest_rows: int = 1) -> int:
    """How many rows are multiplied where so many are asked for: at most 1/16 more above 32.

    oneDNN makes a kernel for every number of rows and shape of weight: 0.5 ms at its first use,
    and 0.6 MiB for good (2.2 GiB for a layer's five shapes at 1 to 600 rows). So 2,048 numbers of
    rows become 128.
    """
    if rows <= 32:
        return max(rows, fewest_rows)
    unit = 1 << (rows - 1).bit_length() - 5
    return -(-rows // unit) * unit


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a two-byte float is multiplied as it is, rather than by way of a float32 copy."""
    return device.type != "cpu" or _is_ours(dtype) or has_onednn(dtype)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernels multiply a two-byte float themselves on this processor."""
    if not _HAS_ONEDNN:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed weights are faster than plain ones here, from what the processor has.

    Told from features and not from a stopwatch, so that two runs on one machine add in one order.
    Blocked ones, measured on one Zen 4 core, 384 to 2048 wide: 1.4 to 2.6 times faster in bfloat16
    at 1 to 8 rows, level with plain from 64 to 1024; float32 1.2 to 2.8 times at 4 to 64, 1.2 at
    1024.
    """
    return device.type == "cpu" and (_is_ours(dtype) or can_block(dtype))


def pack(weight: Tensor, *, streamed: bool = False) -> PackedWeight:
    """Re-order a weight [outputs, inputs] into our panels, or where we have no kernel, oneDNN's.

    streamed  it comes from memory at each step, not from a cache
    cost      a second copy until the plain weight is dropped; no gradient reaches it
    """
    weight = weight.detach()
    if _is_ours(weight.dtype):
        return NativeWeight.of_floats(weight)
    return BlockedWeight(weight, streamed=streamed)


def can_pack_rows(dtype: torch.dtype) -> bool:
    """Whether `pack_rows` takes such weights: oneDNN's blocks cannot be read."""
    return _is_ours(dtype)


def pack_rows(weight: Tensor) -> PackedRows:
    """The same for an embedding that is its own head: see `can_pack_rows`."""
    return NativeRows(weight.detach())


def _is_ours(dtype: torch.dtype) -> bool:
    found = kernels()
    return found is not None and found.multiplies(dtype)


def can_block(dtype: torch.dtype) -> bool:
    """Whether `BlockedWeight` takes such weights."""
    if not _HAS_ONEDNN or platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # not measured elsewhere
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_onednn(dtype))
