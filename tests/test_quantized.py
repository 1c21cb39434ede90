"""Twin: the kernels are the formulas of `ops/quantized.py`, a row the same in every batch."""

from itertools import product

import pytest
import torch

from specinfer.ops.quantized import (
    Int4Weight,
    Int8Weight,
    dequantize,
    pack_int4,
    pack_int8,
    quantize_int4,
    quantize_int8,
    quantize_tokens,
)

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (0, 1, 2, 5, 16, 33, 70)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same, with an odd number of elements from row to row."""
    return torch.cat((x, x[:, :1]), 1)[:, :-1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (7, 5), (61, 33), (96, 64), (32, 400), (40, 2100)]
)
def test_int8_is_its_formula_to_the_bit(outputs, inputs, bias, dtype):
    values, scales = quantize_int8(random(outputs, inputs))
    weights = [Int8Weight(values, scales, fast=fast) for fast in (True, False)]
    weights += [Int8Weight(values, scales, streamed=True), pack_int8(values, scales)]
    b = random(outputs).to(dtype) if bias else None
    for rows in ROWS:
        x = random(rows, 2 * inputs, seed=rows)[:, :inputs].to(dtype)
        a, token_scales = quantize_tokens(x)
        sums = a.double() @ values.double().T
        exact = sums.float() * scales.flatten() * token_scales
        expected = (exact if b is None else exact + b).to(dtype)
        for weight in weights:
            assert torch.equal(weight.multiply(x, b), expected)


def test_int8_sums_beyond_16_bits_are_exact():
    """Without VNNI, pairs of products saturate: what has_vnni() must have found out."""
    values = torch.full((16, 256), 127, dtype=torch.int8)
    for make, sign in product((Int8Weight, pack_int8), (1, -1)):
        weight = make(values, torch.ones(16, 1))
        assert (weight.multiply(torch.full((3, 256), sign * 127.0)) == sign * 256 * 127**2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [16, 61, 96])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_its_formula(group_size, outputs, dtype):
    values, scales = quantize_int4(random(outputs, 256), group_size)
    meant = dequantize(values, scales).double()
    b = random(outputs).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    weights = [Int4Weight(values, scales, dtype=dtype, fast=fast) for fast in (True, False)]
    for weight in (*weights, pack_int4(values, scales, dtype=dtype)):
        for rows in ROWS:
            x = random(rows, 256, seed=rows).to(dtype)
            size = x.double().abs() @ meant.abs().T + b.double().abs()
            for each in (x, apart(x)):
                y = weight.multiply(each, b)
                assert y.shape == (rows, outputs)
                assert y.dtype == dtype
                assert ((y - (x.double() @ meant.T + b.double())).abs() <= tolerance * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [(Int8Weight, Int4Weight), (pack_int8, pack_int4)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_is_the_same_bits_in_every_batch(bits, make, dtype):
    w, b = random(112, 320), random(112).to(dtype)
    weight = (
        make[0](*quantize_int8(w)) if bits == 8 else make[1](*quantize_int4(w, 32), dtype=dtype)
    )
    x = random(70, 320, seed=1).to(dtype)
    x[1::2] *= 1000  # neighbours of another size
    together = weight.multiply(x, b)
    for rows in (*range(1, 20), 33, 64):
        assert torch.equal(weight.multiply(x[:rows], b), together[:rows])
        assert torch.equal(weight.multiply(x[-rows:], b), together[-rows:])
    assert torch.equal(weight.multiply(x.flip(0), b).flip(0), together)
    if bits == 8:
        assert torch.equal(weight.multiply(x, b, dtype=torch.float32).to(dtype), together)


@pytest.mark.parametrize("make", [Int8Weight, pack_int8])
def test_a_row_that_is_not_finite_stays_so_and_alone(make):
    """Rounded to bytes, NaN would be a number like any other."""
    weight, x = make(*quantize_int8(random(40, 70))), random(4, 70)
    expected = weight.multiply(x)
    x[1, 3], x[2, 69] = torch.nan, torch.inf
    y = weight.multiply(x)
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[::3], expected[::3])


def test_rounded_values_are_the_nearest():
    w = random(40, 96)
    values, scales = quantize_int8(w)
    assert values.abs().max() <= 127
    largest = 127.5 * scales  # a scale is rounded itself, so the largest weight may be cut
    error = dequantize(values, scales) - w.clamp(-largest, largest)
    assert (error.abs() <= 0.5001 * scales).all()
    assert torch.equal(scales.bfloat16().float(), scales)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_errs_less_than_plain_rounding(group_size):
    w = random(64, 256) ** 3  # long tails
    values, scales = quantize_int4(w, group_size)
    assert values.min() >= -8
    assert values.max() <= 7
    meant = dequantize(values, scales)
    assert torch.equal(meant.bfloat16().float(), meant), "a value times its scale is exact"
    grouped = w.unflatten(-1, (-1, group_size))
    step = grouped.abs().amax(-1, keepdim=True) / 7
    plain = ((grouped / step).round() * step).flatten(1)
    assert (meant - w).square().sum() < 0.9 * (plain - w).square().sum()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_kernel_rounds_to_int4_as_plain_pytorch_to_the_bit(group_size, dtype):
    w = torch.cat((random(37, 5 * group_size), random(11, 5 * group_size, seed=1) ** 5))
    w[3], w[4, ::2], w[5] = 0.0, -0.0, 1.0
    w[6:9] *= torch.tensor([[1e-3], [1e-31], [1e-42]])
    w[9:12] *= torch.tensor([[1e4], [1e17], [1e30]])
    w[12], w[13, ::2] = random(5 * group_size).sign(), -3.0  # extremes of both signs, equally far
    w[14, ::3], w[15] = 8.5, (torch.arange(5 * group_size) % 16 - 8).float()  # ties
    w = w.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    w[16, 0], w[17, 1], w[18, 2] = torch.inf, -torch.inf, torch.nan
    for each in (w, w[:1, :group_size], w[:, group_size : 2 * group_size], w[:0]):
        values, scales = quantize_int4(each, group_size)
        expected = quantize_int4(each, group_size, fast=False)
        assert torch.equal(values, expected[0])
        assert torch.equal(scales.view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("fast", [True, False])
def test_a_group_that_is_not_finite_is_not_rounded_to_what_is(fast):
    w = random(4, 64)
    w[1, 3], w[2, 40] = torch.nan, torch.inf
    values, scales = quantize_int4(w, 32, fast=fast)
    expected = [[False, False], [True, False], [False, True], [False, False]]
    assert scales.isnan().tolist() == expected
    y = pack_int4(values, scales, dtype=torch.float32).multiply(random(3, 64))
    assert y.isfinite().all(0).tolist() == [True, False, False, True]


def test_zeros_stay_zeros():
    zeros = torch.zeros(32, 64)
    for values, scales in (quantize_int8(zeros), quantize_int4(zeros, 32)):
        assert not values.any()
        assert (scales > 0).all()
    weight = Int8Weight(*quantize_int8(random(32, 64)))
    assert not weight.multiply(zeros).any()


def test_large_weights_are_rounded_in_parts(monkeypatch):
    w = random(50, 64)
    whole = quantize_int8(w) + quantize_int4(w, 32, fast=False)
    monkeypatch.setattr("specinfer.ops.quantized._CHUNK", 7 * 64)
    parts = quantize_int8(w) + quantize_int4(w, 32, fast=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
