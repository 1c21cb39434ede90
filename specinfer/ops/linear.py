"""Dense matrix products: one signature, a plain PyTorch reference and a fast path for processors.

oneDNN multiplies from its own blocked layout faster than from rows. The weight itself carries the
choice, made once at load: `pack` re-orders it (and replaces it) and `linear` sees which it got.

Fused post-ops were tried and left out: adding the residual inside saves under 1 % of a step, and
swish and mul inside cost a second product (60 against 48 us at one token, 384 -> 1024).
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()
# Resolved here because a look-up costs microseconds, and absent where torch is built without it.
_reorder: Any = torch.ops.mkldnn._reorder_linear_weight.default if _HAS_ONEDNN else None
_multiply: Any = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None
_NO_SCALARS: list[float] = []


STREAMING_ROWS = 6
"""What `fewest_rows` should be for weights that come from memory at each step, not from a cache.

oneDNN's kernels for one to three rows read blocked weights more slowly than the one for six: 19
against 25 GB/s in bfloat16 where memory gave 30 (two Zen 4 cores, 1536 wide), 14 % of a step at the
1B cost. From a cache it is the other way round.
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, fewest_rows: int = 1) -> Tensor:
    """Multiply rows by a weight: x @ weight.T + bias.

    x            [n, inputs], any strides, n may be 0
    weight       [outputs, inputs], plain or from `pack`
    bias         [outputs] or None
    fewest_rows  blocked weights multiply `padded` rows, zeros below x; see STREAMING_ROWS
    returns      [n, outputs], x's dtype
    error    both accumulate in float32; they differ by the order of the sum, so by some 1e-7 of
             the row's sum of products in float32 and by one rounding in bfloat16
    """
    if weight.is_mkldnn:
        rows = x.shape[0]
        size = padded(rows, fewest_rows)
        if size > rows > 0:
            x = F.pad(x, (0, 0, 0, size - rows))
            return _multiply(x, weight, bias, "none", _NO_SCALARS, "")[:rows]  # type: ignore[no-any-return]
        return _multiply(x, weight, bias, "none", _NO_SCALARS, "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def padded(rows: int, fewest_rows: int = 1) -> int:
    """How many rows are multiplied where so many are asked for: at most 1/16 more above 32.

    oneDNN makes a kernel for every number of rows and shape of weight: 0.5 ms at its first use,
    and 0.6 MiB for good (2.2 GiB for a layer's five shapes at 1 to 600 rows). So 2,048 numbers of
    rows become 128.
    """
    if rows <= 32:
        return max(rows, fewest_rows)
    unit = 1 << (rows - 1).bit_length() - 5
    return -(-rows // unit) * unit


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies a two-byte float itself, rather than by way of float32."""
    if device.type != "cpu":
        return True
    if not _HAS_ONEDNN:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether blocked weights are faster than plain ones here, from what the processor has.

    Told from features and not from a stopwatch, so that two runs on one machine add in one order.
    Measured on one Zen 4 core, 384 to 2048 wide: 1.4 to 2.6 times faster in bfloat16 at 1 to 8
    rows, level with plain from 64 to 1024; float32 1.2 to 2.8 times at 4 to 64, 1.2 at 1024.
    """
    if device.type != "cpu" or not _HAS_ONEDNN:
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # not measured elsewhere
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_native(dtype, device))


def pack(weight: Tensor) -> Tensor:
    """Re-order a weight [outputs, inputs] into oneDNN's blocked layout: opaque, for `linear` only.

    cost  a second copy until the plain weight is dropped; no gradient reaches it
    """
    return _reorder(weight.detach())  # type: ignore[no-any-return]
