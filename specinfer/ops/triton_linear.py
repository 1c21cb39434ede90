"""Products with int8, int4 and fp8 weights on a GPU: one Triton kernel for all three.

    y = s_output · Σ x w      int8, fp8: activations are not rounded here
    y = Σ x (s_group · w)     int4

A GPU waits for weights at up to some hundred rows, so that half or a quarter of their bytes is half
or a quarter of the time. Values become floats in registers, and sums are float32 in one order that
the weight's shape alone decides: how many rows there are changes neither the steps of a sum nor
where it is split.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specinfer.errors import DependencyError
from specinfer.ops.packed import PackedWeight

_PANEL = 128
"""Outputs of one program."""

_STEP = 128
"""Inputs of one step."""

_TILES: tuple[int, ...] = (16, 32, 64)
"""Rows of one program."""

_PROGRAMS = 256
"""A weight with fewer panels has its inputs split until there are so many programs: two for each of
an H200's multiprocessors. Not measured."""

_LEAST_STEPS = 4
"""Steps of a split at least: fewer do not fill the pipeline."""


class TritonWeight(PackedWeight):
    """A rounded weight in panels, for rows of one dtype.

    error  accumulates in float32, the result is rounded once. int8 and fp8 values are exact, int4
           ones times their scale as `quantize_int4` gives them too; scales of others are rounded to
           dtype, and the product again
    rows   a row's bits do not depend on the others' values; nor on their number, where the matrix
           instruction sums up alike at every width (Hopper's and Ampere's have one depth)
    """

    def __init__(self, values: Tensor, scales: Tensor, *, bits: int, dtype: torch.dtype) -> None:
        """Pack what was rounded, where it is.

        values  [outputs, inputs] int8, in -8 … 7 of int4, or float8_e4m3fn, none of them NaN
        scales  [outputs, groups] float32: one group, or int4's of 32, 64 or 128 inputs
        dtype   of the rows
        raises  DependencyError if triton is not installed
        cost    some four times the values' bytes until it returns
        """
        self._kernels = kernels = _import_kernels()
        self._dtype = dtype
        # float32 has no matrix instruction: larger tiles would not fit into registers.
        is_wide = dtype == torch.float32
        self._tiles = _TILES[:1] if is_wide else _TILES
        self._num_stages = 2 if is_wide else 4
        self._num_outputs, self._num_inputs = values.shape
        # What bits are made into: a float32's products are of what bfloat16 holds exactly.
        narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
        pairs_of_group = 1
        if values.dtype == torch.float8_e4m3fn:
            kind, codes = kernels.FP8, values.view(torch.uint8)
        elif bits == 8:
            kind, codes = kernels.INT8, values.view(torch.uint8) ^ 128
        else:
            kind, codes = kernels.INT4, (values + 8).view(torch.uint8)
            group_size = self._num_inputs // scales.shape[1]
            pairs_of_group = group_size // 32
        self._words = _in_panels(codes, bits)
        if kind == kernels.INT4:
            self._scales = _scales_in_panels(scales.to(narrow), _STEP // group_size)
        else:
            self._scales = scales.flatten().float().contiguous()
        num_panels, num_steps = self._words.shape[:2]
        wanted = -(-_PROGRAMS // num_panels)
        self._split_steps = max(_LEAST_STEPS, -(-num_steps // wanted))
        self._num_splits = -(-num_steps // self._split_steps)
        self._constants: dict[str, Any] = {
            "KIND": kind.value,
            "BLOCK_N": _PANEL,
            "WORDS": self._words.shape[3],
            "GROUP_PAIRS": pairs_of_group,
            "NARROW": kernels.TYPES[narrow],
            "TYPE": kernels.TYPES[torch.float32 if kernels.IS_INTERPRETED else dtype],
        }

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As the base class says; launches, and nothing on the host waits."""
        assert x.dtype == self._dtype
        num_rows = x.shape[0]
        out = torch.empty((num_rows, self._num_outputs), dtype=dtype or x.dtype, device=x.device)
        if num_rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        tile = next((size for size in self._tiles if size >= num_rows), self._tiles[-1])
        grid = (-(-num_rows // tile), self._words.shape[0])
        # Many rows are programs enough: then one goes through all splits, to the same bits.
        is_split = self._num_splits > 1 and grid[0] * grid[1] < _PROGRAMS
        sums = out
        if is_split:
            shape = (self._num_splits, *out.shape)
            sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        own = (self._scales, out if bias is None else bias)  # never read without a bias
        self._kernels.multiply[*grid, self._num_splits if is_split else 1](
            x,
            self._words,
            *own,
            out,
            sums,
            num_rows,
            self._num_inputs,
            self._num_outputs,
            x.stride(0),
            self._words.shape[1],
            self._split_steps,
            **self._constants,
            BLOCK_M=tile,
            SPLIT=is_split,
            LOOPED=self._num_splits > 1 and not is_split,
            BIASED=bias is not None,
            num_warps=8 if tile > 32 else 4,
            num_stages=self._num_stages,
        )
        if is_split:
            block = 512
            self._kernels.add_up[num_rows, -(-self._num_outputs // block)](
                *(sums, *own, out),
                *(num_rows, self._num_outputs, self._num_splits),
                KIND=self._constants["KIND"],
                BLOCK=block,
                BIASED=bias is not None,
            )
        return out


def _in_panels(codes: Tensor, bits: int) -> Tensor:
    """codes [outputs, inputs] uint8, the lowest bits of each -> [panels, steps, _PANEL, words].

    Word w of a step has at bit `bits · pair + 16 · half` the input 32 · pair + 2 w + half, of int4;
    64 · pair + … of others. What is missing at the ends is any value: its inputs are 0.
    """
    outputs, inputs = codes.shape
    num_panels, num_steps = -(-outputs // _PANEL), -(-inputs // _STEP)
    codes = F.pad(codes, (0, num_steps * _STEP - inputs, 0, num_panels * _PANEL - outputs))
    pairs = 16 // bits
    dealt = codes.view(num_panels, _PANEL, num_steps, pairs, -1, 2)
    words = torch.zeros_like(dealt[:, :, :, 0, :, 0], dtype=torch.int32)
    for pair in range(pairs):
        for half in range(2):
            words |= dealt[:, :, :, pair, :, half].int() << (bits * pair + 16 * half)
    return words.permute(0, 2, 1, 3).contiguous()


def _scales_in_panels(scales: Tensor, per_step: int) -> Tensor:
    """scales [outputs, groups] of two bytes -> words of two, [panels, steps, n, _PANEL] int32.

    per_step  groups of a step; where it is one, half a word is empty
    """
    outputs, groups = scales.shape
    num_panels, num_steps = -(-outputs // _PANEL), -(-groups // per_step)
    scales = F.pad(scales, (0, num_steps * per_step - groups, 0, num_panels * _PANEL - outputs))
    dealt = scales.view(num_panels, _PANEL, num_steps, per_step)
    dealt = F.pad(dealt, (0, per_step % 2)).contiguous()
    return dealt.view(torch.int32).permute(0, 2, 3, 1).contiguous()


def _import_kernels() -> ModuleType:
    try:
        from specinfer.ops import triton_linear_kernels
    except ImportError as error:
        raise DependencyError(
            "quantised weights on a GPU need triton, which is not installed: "
            "pip install 'specinfer[gpu]'"
        ) from error
    return triton_linear_kernels
