"""Every form of our kernels: what this processor would not choose is compiled and run too."""

from collections.abc import Iterator

import pytest
import torch

from specinfer.errors import ConfigError
from specinfer.ops.native import Kernels, NativeWeight, build
from specinfer.ops.quantized import (
    dequantize,
    multiply_reference,
    quantize_int4,
    quantize_int8,
    quantize_tokens,
)
from tests import test_native
from tests.test_native import random

LANES = {"1": None, "avx2": 8, "portable": 4}
USERS = ("ops.native", "ops.native.segments", "ops.linear", "ops.quantized", "run.native")
ROWS = 37


@pytest.fixture(params=LANES, scope="module", autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever is packed or computed meanwhile is by this form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECINFER_NATIVE", request.param)
        try:
            library = build.library.__wrapped__()
        except ConfigError as error:
            pytest.skip(str(error))
        if library is None:
            pytest.skip("no kernels of ours here")
        found = Kernels(library)
        assert LANES[request.param] in (None, found.lanes)
        for user in USERS:
            patch.setattr(f"specinfer.{user}.kernels", lambda: found)
        yield


def check_rows(weight: NativeWeight, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The product, and that a row's is the same bits alone and in any company."""
    y = weight.multiply(x, bias)
    for start, stop in ((0, 1), (7, 9), (1, 4), (5, 18), (ROWS - 1, ROWS)):
        assert torch.equal(weight.multiply(x[start:stop], bias), y[start:stop])
    return y


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    x, weight, bias = x.double(), weight.double(), bias.double()
    size = x.abs() @ weight.abs().T + bias.abs()
    tolerance = 1e-6 if y.dtype == torch.float32 else 2**-8
    assert ((y - (x @ weight.T + bias)).abs() <= tolerance * size).all()


@pytest.mark.parametrize("dtype", test_native.DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (70, 203), (96, 128)])
def test_floats(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    test_native.require(dtype)
    x, weight, bias = (
        random(*shape, seed=seed).to(dtype)
        for seed, shape in enumerate([(ROWS, inputs), (outputs, inputs), (outputs,)])
    )
    y = check_rows(NativeWeight.of_floats(weight), x, bias)
    check(y, x, weight, bias)


@pytest.mark.parametrize("dtype", test_native.DTYPES)
def test_int4(dtype: torch.dtype) -> None:
    test_native.require(dtype)
    x, bias = random(ROWS, 192).to(dtype), random(70, seed=1).to(dtype)
    values, scales = quantize_int4(random(70, 192, seed=2), 32)
    y = check_rows(NativeWeight.of_int4(values, scales), x, bias)
    check(y, x, dequantize(values, scales), bias)


def test_int8_sums_are_exact() -> None:
    """Also where pairs of products would saturate at 16 bits: every value the largest there is."""
    x, bias = random(ROWS, 203), torch.zeros(70)
    values, scales = quantize_int8(random(70, 203, seed=1))
    x[3], values[5], values[6] = 1.0, 127, -127
    y = check_rows(NativeWeight.of_int8(values, scales), x, bias)
    a, scale = quantize_tokens(x)
    expected = multiply_reference(a, values, scales.flatten()) * scale
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(y[3, 5:7], torch.tensor([127.0, -127]) * 203 * scales[5:7, 0])


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    test_native.require(torch.bfloat16)
    bits = torch.randint(0, 1 << 31, (64, 32), generator=torch.Generator().manual_seed(0))
    bits[::2] = bits[::2] & 0x7FFF0000 | 0x8000  # halfway
    bits = torch.where(bits & 0x7F800000 == 0x7F800000, bits & 0x3FFFFFFF, bits)
    bits = torch.where(bits & 0x7F800000 == 0, 0, bits)  # processors differ below 1e-38
    bits[0, 0] = 0x7F7FFFFF  # becomes infinite
    x = bits.to(torch.int32).view(torch.float32)
    y = NativeWeight.of_floats(torch.eye(32)).multiply(x, dtype=torch.bfloat16)
    assert torch.equal(y, x.bfloat16())
    x[1, 1] = torch.nan
    y = NativeWeight.of_floats(torch.eye(32)).multiply(x, dtype=torch.bfloat16)
    assert y[1].isnan().all()
    assert not y[2].isnan().any()


@pytest.mark.parametrize("dtype", test_native.DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    test_native.test_attention_is_the_reference(72, 34, 2, 20, dtype)
    test_native.test_a_node_of_a_tree_is_the_token_of_a_chain_to_the_bit(dtype)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "gelu_pytorch_tanh"])
def test_a_step(name: str, tmp_path) -> None:
    test_native.test_a_step_is_the_decoder(name, tmp_path)


def test_a_step_of_odd_sizes(tmp_path) -> None:
    test_native.test_a_step_of_odd_sizes_reads_nothing_beside_them(tmp_path)
