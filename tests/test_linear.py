"""Twin: blocked and plain products are one function, whatever the rows."""

import pytest
import torch
import torch.nn.functional as F

from specinfer.ops.linear import STREAMING_ROWS, can_pack, has_native, linear, pack, padded

CPU = torch.device("cpu")
# The largest difference, in units of the row's sum of |x| |w|: the order of a float32 sum, and
# one rounding of the result in bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def packable(dtype: torch.dtype) -> None:
    if not can_pack(dtype, CPU):
        pytest.skip(f"no blocked {dtype} here")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 17, 64, 129])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 5), (33, 17), (96, 64)])
@pytest.mark.parametrize("fewest_rows", [1, STREAMING_ROWS])
def test_blocked_equals_plain(fewest_rows, outputs, inputs, rows, bias, dtype):
    packable(dtype)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    b = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    blocked = pack(weight)
    for x in strided_inputs(rows, inputs, dtype, generator):
        y = linear(x, blocked, b, fewest_rows)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        size = F.linear(
            x.double().abs(), weight.double().abs(), None if b is None else b.double().abs()
        )
        assert y.shape == (rows, outputs)
        assert y.dtype == dtype
        assert not y.is_mkldnn
        assert torch.all((y - exact).abs() <= TOLERANCE[dtype] * size)


def strided_inputs(rows, inputs, dtype, generator):
    wide = torch.randn(rows, 2 * inputs, generator=generator).to(dtype)
    yield wide[:, :inputs].contiguous()
    yield wide[:, inputs:]  # a fused product's part: rows further apart than they are long
    yield wide[:, ::2]
    yield torch.randn(inputs, rows, generator=generator).to(dtype).t()


def test_few_numbers_of_rows_are_multiplied() -> None:
    sizes = {rows: padded(rows) for rows in range(1, 2049)}
    assert len(set(sizes.values())) == 128
    assert all(rows <= size <= rows * 17 / 16 for rows, size in sizes.items())
    assert [padded(rows, fewest_rows=6) for rows in (1, 6, 7, 65)] == [6, 6, 7, 68]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_plain_weights_go_to_pytorch(dtype):
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_plain_weights_are_trained():
    weight = torch.randn(5, 8, requires_grad=True)
    linear(torch.randn(3, 8), weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_are_independent(dtype):
    """A row's result does not depend on its neighbours' values: text must not depend on them."""
    packable(dtype)
    x, blocked = torch.randn(9, 64).to(dtype), pack(torch.randn(96, 64).to(dtype))
    other = x.clone()
    other[1:] *= 100
    assert torch.equal(linear(x, blocked)[0], linear(other, blocked)[0])


def test_only_measured_types_are_blocked():
    assert not can_pack(torch.float16, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
    assert has_native(torch.bfloat16, torch.device("cuda"))
