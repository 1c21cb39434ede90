"""Products with quantised weights: int8 for both factors, int4 for the weight alone.

    int8    y = s_token · s_output · Σ a w,  a and w in -127…127: exact integers below the scales
    int4    y = Σ x (s_group · w),           w in -8…7, a scale per group of inputs

Every token has a scale of its own, so a row's result is the same bits alone and in any batch.
The fast kernels are ours (`ops/native`), which read half and a quarter of bfloat16's bytes; without
them int8 is oneDNN's on VNNI and int4 is torch's. A GPU's products, and all with fp8, which is
rounded here too, are in `ops/triton_linear.py`.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specinfer.ops.linear import STREAMING_ROWS, kernel_rows
from specinfer.ops.native import NativeWeight, kernels, round_int4
from specinfer.ops.packed import PackedWeight

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()
# Resolved here because a look-up costs microseconds, and absent where torch is built without it.
_prepack: Any = torch.ops.onednn.qlinear_prepack.default if _HAS_ONEDNN else None
_multiply: Any = torch.ops.onednn.qlinear_pointwise.default if _HAS_ONEDNN else None
_pack_int4: Any = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_multiply_int4: Any = torch.ops.aten._weight_int4pack_mm_for_cpu.default

_LARGEST = 127
_LARGEST_FP8 = 448.0
_ZERO = 128
"""oneDNN's fast kernel takes activations without a sign: 128 stands for 0."""
_SMALLEST = 1e-30
"""Scales are never 0: a row of zeros is zeros in any scale."""
_CHUNK = 1 << 18
"""Weights quantised at a time, so that what is computed on the way stays in a cache."""
_INT4_COLUMNS = 16
"""torch packs int4 weights of a multiple of so many outputs."""

# What a group's largest weight is divided by; -8 is reached by its own sign alone. The smaller
# ones clip it, where the rest gains more than it loses.
_INT4_DIVISORS = (8.0, 7.5, 7.0, 8.5, 9.0, 9.75, 10.5)
_SCALE_BITS = 5
"""Significant bits of an int4 scale: so times 4 bits is exact in bfloat16, in whatever kernel."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to int8 with one scale per output.

    weight   [outputs, inputs]
    returns  values [outputs, inputs] int8, scales [outputs, 1] float32 that bfloat16 holds exactly
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows in _row_chunks(weight):
        part, scale = _scaled(weight[rows], _LARGEST)
        scales[rows] = scale
        values[rows] = part.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return values, scales


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same to float8_e4m3fn: the nearest of its values, the even one of two."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows in _row_chunks(weight):
        part, scale = _scaled(weight[rows], _LARGEST_FP8)
        scales[rows] = scale
        values[rows] = part.clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn)
    return values, scales


def quantize_int4(weight: Tensor, group_size: int, *, fast: bool = True) -> tuple[Tensor, Tensor]:
    """Round a weight to int4 with one scale per group of inputs.

    Of the scales tried a group has the one with the least sum of squared errors, and NaN where that
    is never finite.

    weight   [outputs, inputs], inputs a multiple of group_size, which is a power of two
    fast     False: in plain PyTorch, the same bits
    returns  values [outputs, inputs] int8 in -8…7, scales [outputs, inputs / group_size] float32,
             of either sign and few enough bits that value times scale is exact in bfloat16
    """
    if fast and (found := round_int4(weight, group_size)) is not None:
        return found
    outputs, inputs = weight.shape
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, inputs // group_size, device=weight.device)
    for rows in _row_chunks(weight):
        part = weight[rows].float().unflatten(-1, (-1, group_size))
        low, high = part.aminmax(dim=-1, keepdim=True)
        extreme = torch.where(high > -low, high, low)
        best = torch.full_like(extreme, torch.inf)
        scale, kept = torch.full_like(extreme, torch.nan), torch.zeros_like(part)
        for divisor in _INT4_DIVISORS:
            tried = _few_bits(_over(extreme, -divisor))
            rounded = (part / tried).round_().clamp_(-8, 7)
            error = _fold((rounded * tried).sub_(part).square_())
            is_better = error < best
            best = torch.where(is_better, error, best)
            scale = torch.where(is_better, tried, scale)
            kept = torch.where(is_better, rounded, kept)
        values[rows] = kept.flatten(1).to(torch.int8)
        scales[rows] = scale.squeeze(-1)
    return values, scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """What quantised weights stand for: [outputs, inputs] float32.

    values   [outputs, inputs] int8 or float8_e4m3fn
    scales   [outputs, groups] float32
    """
    grouped = values.float().view(*scales.shape, -1)
    return (grouped * scales[..., None]).view(values.shape)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to int8 by its own largest value.

    x        [n, inputs], finite
    returns  [n, inputs] int8, scales [n, 1] float32
    """
    # A mul or a div rounds alike at the end of a vector and in its middle; a fused multiply-add
    # would not, and a row's place in the batch would show. vector_norm and a direct conversion to
    # uint8 take ten times as long as what is here.
    x = x.float() if x.dtype != torch.float32 else x.clone()
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).mul_(1 / _LARGEST)
    return x.mul_(scale.reciprocal()).round_().to(torch.int8), scale


def pack_int8(
    values: Tensor, scales: Tensor, *, fast: bool = True, streamed: bool = False
) -> PackedWeight:
    """A weight that multiplies activations rounded to int8 with a scale per row.

    values, scales  as `quantize_int8` gives them
    fast            False: in plain PyTorch
    streamed        it comes from memory at each step, not from a cache
    """
    found = kernels()
    if fast and found is not None and found.multiplies(torch.int8):
        return NativeWeight.of_int8(values, scales)
    return Int8Weight(values, scales, fast=fast, streamed=streamed)


def pack_int4(
    values: Tensor, scales: Tensor, *, dtype: torch.dtype, fast: bool = True
) -> PackedWeight:
    """A weight that multiplies activations as they are.

    values, scales  as `quantize_int4` gives them
    dtype           of the activations
    fast            False: in plain PyTorch
    """
    found = kernels()
    if fast and found is not None and found.multiplies(dtype):
        return NativeWeight.of_int4(values, scales)
    return Int4Weight(values, scales, dtype=dtype, fast=fast)


class Int8Weight(PackedWeight):
    """int8 with a scale per output, times activations rounded to int8 with a scale per row.

    error  none against the formula above: sums of integers are exact, scales are applied in
           float32 one after the other, and the result is rounded once to dtype
    cost   where the processor has no VNNI the weight is converted at each call: slow, and equal
    """

    def __init__(
        self, values: Tensor, scales: Tensor, *, fast: bool = True, streamed: bool = False
    ) -> None:
        """As `pack_int8` takes them."""
        self._fewest_rows = STREAMING_ROWS if streamed else 1
        self._num_outputs = values.shape[0]
        self._scales = scales.flatten().float()
        self._packed: Tensor | None = None
        self._values: Tensor | None = None
        if fast and has_vnni():
            self._packed = _prepack(values.contiguous(), None)
        else:
            self._values = values.clone()

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As the base class says."""
        rows, dtype = x.shape[0], dtype or x.dtype
        if rows == 0:
            return x.new_empty(0, self._num_outputs, dtype=dtype)
        if (size := kernel_rows(rows, self._fewest_rows)) > rows:
            x = F.pad(x, (0, 0, 0, size - rows))
        a, scale = quantize_tokens(x)
        out = self._integers(a).mul_(scale)[:rows]
        if bias is not None:
            out.add_(bias)
        return out.to(dtype)

    def _integers(self, a: Tensor) -> Tensor:
        """a [n, inputs] int8 -> Σ a w s_output, [n, outputs] float32."""
        if self._packed is None:
            assert self._values is not None
            return multiply_reference(a, self._values, self._scales)
        shifted = a.view(torch.uint8).bitwise_xor_(_ZERO)  # + 128 in two's complement
        return _shifted_product(shifted, self._packed, self._scales)


def _shifted_product(shifted: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return _multiply(  # type: ignore[no-any-return]
        *(shifted, 1.0, _ZERO, packed, scales, None, None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )


def multiply_reference(a: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Σ a w s_output in plain PyTorch, with exact sums: float64 holds every integer there can be.

    a        [n, inputs] int8
    values   [outputs, inputs] int8
    scales   [outputs] float32
    returns  [n, outputs] float32
    """
    return F.linear(a.double(), values.double()).float().mul_(scales)


class Int4Weight(PackedWeight):
    """int4 with a scale per output and group of inputs; activations stay as they are.

    One kernel for any number of rows, so that a row's result is the same bits in every batch. It
    reads a quarter of bfloat16's bytes and computes in float32: fast for some four rows.
    error  the sum's order: some 1e-7 of the row's sum of products in float32, in bfloat16 one
           rounding
    """

    def __init__(self, values: Tensor, scales: Tensor, *, dtype: torch.dtype, fast: bool = True):
        """As `pack_int4` takes them."""
        self._num_outputs = values.shape[0]
        self._group_size = values.shape[1] // scales.shape[1]
        self._plain: Tensor | None = None
        if not fast:
            self._plain = dequantize(values, scales).to(dtype)
            return
        missing = -values.shape[0] % _INT4_COLUMNS
        shifted = F.pad(values, (0, 0, 0, missing)).to(torch.int32).add_(8)
        self._packed: Tensor = _pack_int4(shifted, 1)
        columns = F.pad(scales, (0, 0, 0, missing)).t().to(dtype)
        self._scales = torch.stack((columns, torch.zeros_like(columns)), -1).contiguous()

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As the base class says."""
        if self._plain is not None:
            out = F.linear(x, self._plain)
        elif x.shape[0] == 0:
            out = x.new_empty(0, self._num_outputs)
        else:
            out = _multiply_int4(x.contiguous(), self._packed, self._group_size, self._scales)
            out = out[:, : self._num_outputs]
        if bias is not None:
            out = out + bias
        return out.to(dtype or x.dtype)


@cache
def has_vnni() -> bool:
    """Whether oneDNN's int8 product is exact here, found out by multiplying.

    Without VNNI its pairs of products saturate at 16 bits. A processor's own word would not do:
    ONEDNN_MAX_CPU_ISA can forbid what it has.
    """
    if not _HAS_ONEDNN or platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # not measured elsewhere
    values = torch.full((64, 64), _LARGEST, dtype=torch.int8)
    scales = torch.ones(64)
    try:
        packed = _prepack(values, None)
        product = _shifted_product(torch.full((4, 64), 255, dtype=torch.uint8), packed, scales)
    except RuntimeError:  # torch built without this kernel
        return False
    return bool((product == 64 * _LARGEST * (255 - _ZERO)).all())


def _row_chunks(weight: Tensor) -> list[slice]:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def _fold(x: Tensor) -> Tensor:
    """[..., a power of two] → [..., 1]: sums, in an order that is the same everywhere."""
    while (size := x.shape[-1]) > 1:
        x = x[..., : size // 2] + x[..., size // 2 :]
    return x


def _scaled(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Each row over its scale, and the scales, so that the largest weight is `largest`."""
    part = weight.float()
    scale = _over(part.abs().amax(-1, keepdim=True), largest).clamp_(min=_SMALLEST)
    scale = scale.bfloat16().float()
    return part / scale, scale


def _over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded alike everywhere: by a plain number a GPU multiplies its reciprocal."""
    return x / x.new_full((), divisor)


def _few_bits(scales: Tensor) -> Tensor:
    """The nearest floats of `_SCALE_BITS` significant bits, the even one of two; never 0.

    By their bits: a power of two is not exact on every device.
    """
    dropped = 24 - _SCALE_BITS
    bits = scales.view(torch.int32)
    half = bits.bitwise_right_shift(dropped).bitwise_and_(1).add_((1 << dropped - 1) - 1)
    kept = half.add_(bits).bitwise_and_(-1 << dropped).view(torch.float32)
    return torch.where(kept.abs() < _SMALLEST, _SMALLEST, kept)
