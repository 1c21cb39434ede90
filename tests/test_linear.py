"""Twin: packed and plain products are one function, whatever the rows."""

import pytest
import torch
import torch.nn.functional as F

from specinfer.ops.linear import BlockedWeight, can_block, can_pack, computes_in, kernel_rows, pack
from specinfer.ops.native import NativeWeight, kernels

CPU = torch.device("cpu")
# The largest difference, in units of the row's sum of |x| |w|: the order of a float32 sum, and
# one rounding of the result in bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def streamed(weight: torch.Tensor) -> BlockedWeight:
    return BlockedWeight(weight, streamed=True)


def require(kind, dtype: torch.dtype) -> None:
    ours = kernels()
    if kind == NativeWeight.of_floats:
        if not (ours and ours.multiplies(dtype)):
            pytest.skip(f"no kernel of ours for {dtype} here")
    elif not can_block(dtype):
        pytest.skip(f"no blocked {dtype} here")


KINDS = [BlockedWeight, streamed, NativeWeight.of_floats]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 12, 17, 64, 129])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 5), (33, 17), (96, 64), (40, 1100)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_plain(kind, outputs, inputs, rows, bias, dtype):
    require(kind, dtype)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    b = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    packed = kind(weight)
    for x in strided_inputs(rows, inputs, dtype, generator):
        y = packed.multiply(x, b)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        size = F.linear(
            x.double().abs(), weight.double().abs(), None if b is None else b.double().abs()
        )
        assert y.shape == (rows, outputs)
        assert y.dtype == dtype
        assert not y.is_mkldnn
        assert torch.all((y - exact).abs() <= TOLERANCE[dtype] * size)
        y = packed.multiply(x, b, dtype=torch.float32)
        assert y.dtype == torch.float32
        assert torch.all((y - exact).abs() <= TOLERANCE[dtype] * size)


def strided_inputs(rows, inputs, dtype, generator):
    wide = torch.randn(rows, 2 * inputs, generator=generator).to(dtype)
    yield wide[:, :inputs].contiguous()
    yield wide[:, inputs:]  # a fused product's part: rows further apart than they are long
    yield wide[:, ::2]
    yield torch.randn(inputs, rows, generator=generator).to(dtype).t()


def test_few_numbers_of_rows_are_multiplied() -> None:
    sizes = {rows: kernel_rows(rows) for rows in range(1, 2049)}
    assert len(set(sizes.values())) == 128
    assert all(rows <= size <= rows * 17 / 16 for rows, size in sizes.items())
    assert [kernel_rows(rows, fewest_rows=6) for rows in (1, 6, 7, 65)] == [6, 6, 7, 68]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind, dtype):
    """A row's result does not depend on its neighbours' values: text must not depend on them."""
    require(kind, dtype)
    x, packed = torch.randn(9, 64).to(dtype), kind(torch.randn(96, 64).to(dtype))
    other = x.clone()
    other[1:] *= 100
    assert torch.equal(packed.multiply(x)[0], packed.multiply(other)[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_our_rows_are_the_same_in_any_company(dtype):
    """Tiles of a row to twelve, several by chunks of a panel, and wide ones."""
    require(NativeWeight.of_floats, dtype)
    x, packed = torch.randn(70, 1100).to(dtype), pack(torch.randn(70, 1100).to(dtype))
    together = packed.multiply(x)
    alone = torch.cat([packed.multiply(row) for row in x.split(1)])
    assert torch.equal(alone, together)
    for rows in (slice(3, 6), slice(10, 22), slice(10, 23), slice(9, 57), slice(20, 70)):
        assert torch.equal(packed.multiply(x[rows]), together[rows])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_our_weights_refuse_what_they_would_misread(dtype):
    """They see addresses alone: other types and lengths would be read as something else."""
    require(NativeWeight.of_floats, dtype)
    packed = pack(torch.randn(70, 64).to(dtype))
    x, b = torch.randn(2, 64).to(dtype), torch.randn(70).to(dtype)
    for wrong in ((x.half(), None), (x.double(), None), (x[:, 1:], None), (x, b.half())):
        with pytest.raises(AssertionError):
            packed.multiply(*wrong)


def test_only_measured_types_are_blocked():
    assert not can_pack(torch.float16, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
    assert computes_in(torch.bfloat16, torch.device("cuda"))
