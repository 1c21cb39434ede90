"""Our own kernels for processors, and their structures in ctypes, field by field."""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from specinfer.ops.native.build import has_tiles, library
from specinfer.ops.packed import PackedRows, PackedWeight

_FLOAT32, _BFLOAT16, _INT8, _INT4 = range(4)
_MOST_LANES = 16
_WIDTH = 32
"""Outputs of a panel."""
_WORD = 4
"""Bytes of a row that one step multiplies."""
_INT4_STEP = 8
"""Inputs of a step of int4."""
_KIND_TYPES = {_FLOAT32: torch.float32, _BFLOAT16: torch.bfloat16}


class Weight(Structure):
    """A packed weight, as linear.h has it."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "inputs", "outputs", "group_size")),
        *((name, c_void_p) for name in ("panels", "scales", "offsets", "bias")),
    )


class Layer(Structure):
    """A decoder layer with its pages, as decoder.cpp has it."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("plan", c_int64),
    )


class Model(Structure):
    """A decoder, as decoder.cpp has it."""

    _fields_ = (
        *((name, c_int64) for name in ("is_bfloat16", "num_layers", "hidden", "heads")),
        *((name, c_int64) for name in ("kv_heads", "head_dim", "inner", "activation", "slots")),
        *((name, c_float) for name in ("eps", "scale")),
        ("layers", POINTER(Layer)),
        *((name, c_void_p) for name in ("norm", "embedding")),
        ("head", Weight),
    )


class Step(Structure):
    """What changes from step to step, as decoder.cpp has it."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_rows", "num_segments")),
        *((name, c_void_p) for name in ("tokens", "positions", "writes", "rows")),
        *((name, c_void_p) for name in ("cos", "sin", "plans", "logits", "seconds")),
    )


class Growing(Structure):
    """What grows in rounds, as growth.h has it."""

    _fields_ = (
        *((name, c_void_p) for name in ("pool", "nodes", "costs")),
        ("num_prices", c_int64),
        ("curves", c_char_p),
        *((name, c_int64) for name in ("num_requests", "source", "width")),
        ("scale", c_float),
        ("least", c_double),
    )


class Place(Structure):
    """Where a growing request's keys stand, as growth.h has it."""

    _fields_ = (("prefix", c_int64), ("slots", c_void_p), ("start", c_int64))


PARTS = ("linears", "lm_head", "attention", "norms", "rest")
"""What `Step.seconds` tells apart, in order."""
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
"""By their number in decoder.cpp."""
_MOST_HEAD_DIM = 512
_MOST_GROUPS = 128
_ROUNDED_GROUPS = (32, 64, 128)


class Kernels:
    """The library's functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        lanes = _function(library, "lanes", ())
        lanes.restype = c_int64
        self.lanes: int = lanes()
        """Floats of a vector: 16 with AVX-512, 8 with AVX2, 4 elsewhere."""
        self.identity = Path(library._name).stem
        """Of these very kernels, as they were compiled: another source, another name."""
        leaves_tiles = self.lanes == _MOST_LANES and has_tiles()
        self.floats = {torch.float32} if leaves_tiles else {torch.float32, torch.bfloat16}
        """What rows may be, and results."""
        self.int8 = not leaves_tiles
        self.pack = _function(library, "pack", (c_void_p, *[c_int64] * 3, c_void_p, c_int))
        self.round_int4 = _function(
            library, "round_int4", (c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int)
        )
        self.multiply = _function(
            library,
            "multiply",
            (POINTER(Weight), c_void_p, c_int64, c_int64, c_void_p, c_int, c_int, c_int),
        )
        self.attend = _function(
            library,
            "attend",
            (c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 4, c_float, c_int, c_int),
        )
        self.step = _function(library, "step", (POINTER(Model), POINTER(Step), c_int), c_int)
        i, p, d = c_int64, c_void_p, c_double
        self.likeliest = _function(library, "likeliest", (p, i, i, i, c_float, p, p))
        self.record = _function(library, "record", (p, p, p, i, d, d, d))
        self.choose = _function(library, "choose", (p, p, i, d, p, i, p), i)
        # The pool of guesses, by its address
        self.pool_new = _function(library, "pool_new", (p, i), p)
        self.pool_free = _function(library, "pool_free", (p,))
        self.pool_price = _function(library, "pool_price", (p, p, i), d)
        self.pool_extend = _function(library, "pool_extend", (p, p, i, p, p, i, i, p, d))
        self.pool_append = _function(library, "pool_append", (p, p, i, p, i))
        self.pool_frontier = _function(library, "pool_frontier", (p, i, d, c_int, p), i)
        self.pool_offered = _function(library, "pool_offered", (p, p), i)
        model, growing = POINTER(Model), POINTER(Growing)
        self.grow = _function(library, "grow", (model, growing, p, i, p, p, c_int, p, p), i)
        self.pool_best = _function(library, "pool_best", (p, p, i, p), i)

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether there are products of weights of this type."""
        return dtype in self.floats or (dtype == torch.int8 and self.int8)


def _function(
    library: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any = None
) -> Any:
    function = getattr(library, f"specinfer_{name}")
    function.argtypes, function.restype = arguments, result
    return function


def address(values: npt.NDArray[Any]) -> int:
    """Where a contiguous, writable array begins, in a quarter of the time `values.ctypes` takes."""
    return ctypes.addressof(_NOTHING.from_buffer(values))  # type: ignore[arg-type]


_NOTHING = ctypes.c_char * 0


@cache
def kernels() -> Kernels | None:
    """Our kernels, or None where there are none: see `build.library`."""
    loaded = library()
    return None if loaded is None else Kernels(loaded)


def can_attend(dtype: torch.dtype, head_dim: int, num_groups: int) -> bool:
    """Whether `Kernels.attend` and `Kernels.step` take such heads."""
    found = kernels()
    return (
        found is not None
        and dtype in found.floats
        and head_dim % 2 == 0
        and head_dim <= _MOST_HEAD_DIM
        and num_groups <= _MOST_GROUPS
    )


def round_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor] | None:
    """`quantize_int4` of ops/quantized.py to the bit, or None for what no kernel rounds."""
    found = kernels()
    if found is None or weight.device.type != "cpu" or group_size not in _ROUNDED_GROUPS:
        return None
    weight = (weight if weight.dtype in _KIND_TYPES.values() else weight.float()).contiguous()
    outputs, groups = weight.shape[0], weight.shape[1] // group_size
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(outputs, groups)
    found.round_int4(
        *(weight.data_ptr(), weight.dtype == torch.bfloat16, outputs * groups, group_size),
        *(values.data_ptr(), scales.data_ptr(), torch.get_num_threads()),
    )
    return values, scales


class NativeWeight(PackedWeight):
    """A weight in panels: see linear.h. A row's result is the same bits beside any other rows."""

    def __init__(
        self, kind: int, shape: torch.Size, panels: Tensor, *, group_size: int = 0
    ) -> None:
        found = kernels()
        assert found is not None
        self._multiply, self._floats = found.multiply, found.floats
        self._outputs, self._inputs = shape
        self.panels = panels
        self._kept: list[Tensor] = [panels]  # what addresses below belong to
        self._struct = Weight(
            kind=kind,
            inputs=self._inputs,
            outputs=self._outputs,
            group_size=group_size,
            panels=panels.data_ptr(),
        )

    @classmethod
    def of_floats(cls, weight: Tensor) -> "NativeWeight":
        """From a weight [outputs, inputs] in float32 or bfloat16."""
        return cls(*_floats(weight))

    @classmethod
    def of_int8(cls, values: Tensor, scales: Tensor) -> "NativeWeight":
        """From values [outputs, inputs] int8 and scales [outputs, 1] float32."""
        weight = cls(_INT8, values.shape, _panels(values))
        # In parts, since a sum converts all it adds first.
        sums = [part.sum(-1, dtype=torch.int32) for part in values.split(_WIDTH)]
        offsets = torch.cat(sums).mul_(128)
        scales = scales.flatten().float().contiguous()
        weight._kept += [offsets, scales]
        weight._struct.offsets, weight._struct.scales = offsets.data_ptr(), scales.data_ptr()
        return weight

    @classmethod
    def of_int4(cls, values: Tensor, scales: Tensor) -> "NativeWeight":
        """From values [outputs, inputs] int8 in -8…7 and scales [outputs, groups] float32."""
        inputs, groups = values.shape[1], scales.shape[1]
        weight = cls(_INT4, values.shape, _panels(_nibbles(values)), group_size=inputs // groups)
        columns = F.pad(scales.float(), (0, 0, 0, -len(scales) % _WIDTH)).t().contiguous()
        weight._kept.append(columns)
        weight._struct.scales = columns.data_ptr()
        return weight

    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As the base class says; accumulates in float32, int8 in integers.

        A weight of floats takes rows of its own type. A rounded one takes any: those that no kernel
        reads are made float32, and so are results that none writes.
        """
        asked, kind = dtype or x.dtype, self._struct.kind
        if kind in (_INT8, _INT4) and x.dtype not in self._floats:
            x, bias = x.float(), None if bias is None else bias.float()
        # Addresses say nothing of what stands there.
        assert x.device.type == "cpu"
        assert x.shape[1] == self._inputs
        assert x.dtype == _KIND_TYPES.get(kind, x.dtype)
        assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
        unit = 1 if kind == _INT8 else _WORD // x.element_size()  # rows are read in words
        if missing := -self._inputs % unit:
            x = F.pad(x, (0, missing))
        if x.stride(-1) != 1 or x.stride(0) % unit:
            x = x.contiguous()
        rows, struct = x.shape[0], self.with_bias(bias)
        made = asked if asked in self._floats else torch.float32
        out = torch.empty(rows, self._outputs, dtype=made, device=x.device)
        self._multiply(
            *(ctypes.byref(struct), x.data_ptr(), x.stride(0), rows, out.data_ptr()),
            *(x.dtype == torch.bfloat16, made == torch.bfloat16, torch.get_num_threads()),
        )
        return out.to(asked)

    def with_bias(self, bias: Tensor | None) -> Weight:
        """The structure, for as long as this weight and the bias live."""
        if bias is None:
            return self._struct
        struct = Weight.from_buffer_copy(self._struct)
        struct.bias = bias.data_ptr()
        return struct


class NativeRows(NativeWeight, PackedRows):
    """A weight of floats in panels, whose rows can be looked up."""

    def __init__(self, weight: Tensor) -> None:
        """From a weight [outputs, inputs] in float32 or bfloat16."""
        super().__init__(*_floats(weight))
        self._dtype = weight.dtype

    def rows(self, indices: Tensor) -> Tensor:
        """As the base class says."""
        words = self.panels[indices // _WIDTH, :, indices % _WIDTH]
        return words.view(self._dtype)[:, : self._inputs]


def _floats(weight: Tensor) -> tuple[int, torch.Size, Tensor]:
    kind = _FLOAT32 if weight.dtype == torch.float32 else _BFLOAT16
    return kind, weight.shape, _panels(weight)


def _nibbles(values: Tensor) -> Tensor:
    """[outputs, inputs] int8 in -8…7 -> [outputs, inputs / 8] words, with 8 added to each value.

    A word has inputs 0, 2, 4 and 6 in its lower half, from the lowest bits on, then 1, 3, 5 and 7.
    """
    words = torch.empty(values.shape[0], values.shape[1] // _INT4_STEP, dtype=torch.int32)
    for part, to in zip(values.split(_WIDTH), words.split(_WIDTH), strict=True):
        # Eight bytes are one number; shifted, byte i has inputs i and i + 2. Of bytes 0, 1, 4 and 5
        # the word is made.
        bits = part.contiguous().add(8).view(torch.int64)
        bits.bitwise_or_(bits >> 12)
        pairs = bits.view(torch.int32).bitwise_and_(0xFFFF)
        spread = pairs.bitwise_or_(pairs << 8).bitwise_and_(0xFF00FF).view(*bits.shape, 2)
        torch.bitwise_or(spread[..., 0], spread[..., 1] << 8, out=to)
    return words


def _panels(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [panels, words, 32] words, with zeros for what is missing."""
    found = kernels()
    assert found is not None
    outputs, inputs = weight.shape
    unit = _WORD // weight.element_size()
    if inputs % unit:
        weight = F.pad(weight, (0, -inputs % unit))
    weight = weight.contiguous()
    words = weight.shape[1] // unit
    panels = torch.empty(-(-outputs // _WIDTH), words, _WIDTH, dtype=torch.int32)
    found.pack(weight.data_ptr(), words, outputs, words, panels.data_ptr(), torch.get_num_threads())
    return panels
