"""Dense matrix products: one signature, a plain PyTorch reference and a fast path for processors.

oneDNN reads weights two to three times faster from its own blocked layout than from rows. The
weight itself carries the choice, made once at load: `pack` re-orders it (it replaces the plain
one) and `linear` sees which it was given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_multiply = torch.ops.mkldnn._linear_pointwise.default
_NO_SCALARS: list[float] = []


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight: x @ weight.T + bias.

    x        [n, inputs], any strides, n may be 0
    weight   [outputs, inputs], plain or from `pack`
    bias     [outputs] or None
    returns  [n, outputs], x's dtype
    """
    if weight.is_mkldnn:
        return _multiply(x, weight, bias, "none", _NO_SCALARS, "")
    return F.linear(x, weight, bias)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether blocked weights are faster than plain ones here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def pack(weight: Tensor) -> Tensor:
    """Re-order a weight [outputs, inputs] into oneDNN's blocked layout, for `linear` only."""
    return _reorder(weight.detach())
