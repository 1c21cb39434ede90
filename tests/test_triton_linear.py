"""Twin: rounded weights multiply by their formula, on a GPU or in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specinfer.errors import DependencyError
from specinfer.ops import triton_linear
from specinfer.ops.quantized import dequantize, quantize_fp8, quantize_int4, quantize_int8
from specinfer.ops.triton_linear import TritonWeight

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES = ("fp8", "int8", 32, 64, 128)
# Of the row's sum of |x| |w|: the order of a float32 sum.
TOLERANCE = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(scheme: str | int, weight: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(scheme, int):
        return quantize_int4(weight, scheme)
    return (quantize_fp8 if scheme == "fp8" else quantize_int8)(weight)


def packed(scheme: str | int, values: Tensor, scales: Tensor, dtype: torch.dtype) -> TritonWeight:
    bits = 4 if isinstance(scheme, int) else 8
    return TritonWeight(values.to(DEVICE), scales.to(DEVICE), bits=bits, dtype=dtype)


def multiplied(
    weight: TritonWeight, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    on_device = None if bias is None else bias.to(DEVICE)
    return weight.multiply(x.to(DEVICE), on_device, dtype=dtype).cpu()


def assert_is_formula(
    weight: TritonWeight, meant: Tensor, x: Tensor, bias: Tensor | None, tolerance: float
) -> None:
    """In float32, and the same rounded once; the interpreter cuts off what it should round."""
    exact, size = x.double() @ meant.double().T, x.double().abs() @ meant.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    y = multiplied(weight, x, bias, torch.float32)
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= tolerance * size).all()
    narrow = multiplied(weight, x, bias)
    assert narrow.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps
    assert ((narrow - y).abs() <= unit * y.abs()).all()


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [*((scheme, torch.bfloat16) for scheme in SCHEMES), ("fp8", torch.float16)],
)
def test_a_product_is_its_formula(scheme: str | int, dtype: torch.dtype) -> None:
    for outputs, inputs, counts in ((61, 256, (0, 1, 3, 16, 33)), (129, 640, (3,))):
        values, scales = rounded(scheme, random(outputs, inputs))
        weight, meant = packed(scheme, values, scales, dtype), dequantize(values, scales)
        for rows in counts:
            x = random(rows, inputs, seed=rows).to(dtype)
            bias = random(outputs).to(dtype) if rows % 2 else None
            assert_is_formula(weight, meant, x, bias, TOLERANCE)


@pytest.mark.parametrize(
    ("scheme", "inputs"), [("fp8", 5), ("int8", 150), (32, 32), (32, 160), (64, 192), (64, 320)]
)
def test_inputs_that_fill_no_step(scheme: str | int, inputs: int) -> None:
    values, scales = rounded(scheme, random(7, inputs))
    weight, meant = packed(scheme, values, scales, torch.bfloat16), dequantize(values, scales)
    wide = random(4, 2 * inputs).bfloat16()
    columns = random(inputs, 4).bfloat16().t()
    for x in (wide[:, inputs:], wide[:, ::2], columns):
        assert_is_formula(weight, meant, x, None, TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, "fp8"])
def test_every_value_there_is_comes_back_exactly(bits: int | str, dtype: torch.dtype) -> None:
    """Each in each place of a word: -8 … 7, -128 … 127, e4m3's with its subnormals."""
    if bits == "fp8":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = codes[codes.float().isfinite()]
    else:
        codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
    count = len(codes)
    places = torch.arange(128)
    values = codes.view(torch.uint8)[(places + torch.arange(count)[:, None]) % count]
    values = values.view(codes.dtype)
    scales = torch.full((count, 4 if bits == 4 else 1), 0.5)
    weight = packed(32 if bits == 4 else "", values, scales, dtype)
    y = multiplied(weight, torch.eye(128, dtype=dtype), dtype=torch.float32)
    assert torch.equal(y.T, 0.5 * values.float())


@pytest.mark.parametrize("scheme", ["fp8", "int8", 32])
def test_a_row_is_the_same_bits_in_every_batch(scheme: str | int) -> None:
    # The interpreter has one tile: how numpy sums for others is not what is asked.
    counts = (1, 7) if DEVICE.type == "cpu" else (*range(1, 17), 33, 64, 100, 257)
    weight = packed(scheme, *rounded(scheme, random(70, 640)), torch.bfloat16)
    assert weight._num_splits == 2
    bias = random(70).bfloat16()
    x = random(max(16, *counts), 640, seed=1).bfloat16()
    x[1::2] *= 1000  # neighbours of another size
    together = multiplied(weight, x, bias)
    for rows in counts:
        assert torch.equal(multiplied(weight, x[:rows], bias), together[:rows])
        assert torch.equal(multiplied(weight, x[-rows:], bias), together[-rows:])
    assert torch.equal(multiplied(weight, x.flip(0), bias).flip(0), together)


@pytest.mark.parametrize("scheme", ["fp8", 32])
def test_splits_are_the_weights_own_and_added_in_order(
    scheme: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits by programs side by side and by one program."""
    weight = packed(scheme, *rounded(scheme, random(150, 1280)), torch.bfloat16)
    assert weight._num_splits == 3
    x, bias = random(9, 1280, seed=1).bfloat16(), random(150).bfloat16()
    side_by_side = multiplied(weight, x, bias, torch.float32)
    monkeypatch.setattr(triton_linear, "_PROGRAMS", 1)
    assert torch.equal(multiplied(weight, x, bias, torch.float32), side_by_side)
    whole = packed(scheme, *rounded(scheme, random(150, 1280)), torch.bfloat16)
    assert whole._num_splits == 1
    assert not torch.equal(multiplied(whole, x, bias, torch.float32), side_by_side)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_is_not_finite_stays_so_and_alone() -> None:
    weight, x = packed("fp8", *rounded("fp8", random(40, 70)), torch.float16), random(4, 70).half()
    expected = multiplied(weight, x)
    x[1, 3], x[2, 69] = torch.nan, torch.inf
    y = multiplied(weight, x)
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[::3], expected[::3])


@pytest.mark.parametrize("group_size", [32, 128])
def test_scales_of_another_tool_are_rounded_to_the_rows_dtype(group_size: int) -> None:
    values, scales = rounded(group_size, random(50, 256))
    scales = scales * 1.2345678
    weight = packed(group_size, values, scales, torch.bfloat16)
    meant, x = dequantize(values, scales), random(3, 256).bfloat16()
    assert_is_formula(weight, meant, x, None, 2**-7)
    assert_is_formula(weight, dequantize(values, scales.bfloat16().float()), x, None, 2**-8)


def test_the_largest_weight_of_an_output_is_fp8s_largest() -> None:
    weight = random(40, 96)
    values, scales = quantize_fp8(weight)
    assert torch.equal(scales.bfloat16().float(), scales)
    # Of e4m3's three bits of mantissa; a scale is rounded itself, so the largest may be cut.
    largest = 448 * scales
    error = (dequantize(values, scales) - weight.clamp(-largest, largest)).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scales * 2**-10)).all()
    assert ((values.float().abs().amax(1) - 448).abs() <= 32).all()
    assert not quantize_fp8(torch.zeros(2, 3))[0].float().any()


def test_without_triton_it_says_what_to_install() -> None:
    code = (
        "import sys, specinfer.models.weights, specinfer.ops.triton_linear as each;"
        "assert 'triton' not in sys.modules;"
        "sys.modules['triton'] = None;"
        "each._import_kernels()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{DependencyError.__name__}: quantised weights on a GPU need triton" in run.stderr
    assert "pip install 'specinfer[gpu]'" in run.stderr


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from specinfer.ops.quantized import quantize_fp8, quantize_int4, quantize_int8
from specinfer.ops.triton_linear import TritonWeight

class Hopper:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

def compiled(kernel, grid):
    def launch(*args, **options):
        made = kernel.run(*args, grid=grid, warmup=True, **options)
        ptx = made.asm["ptx"]
        is_product = kernel.__name__ == "multiply"
        # Loads run ahead, two values are made at once, and subnormals are kept.
        wanted = ("wgmma", "cp.async", ".bf16x2") if is_product else ()
        print(len(made.asm["cubin"]) > 0 and "ftz" not in ptx and all(w in ptx for w in wanted))
    return launch

driver.set_active(Hopper())
JITFunction.__getitem__ = compiled
weight = torch.randn(512, 4096)
for bits, rounded in (
    (8, quantize_fp8(weight)), (8, quantize_int8(weight)), (4, quantize_int4(weight, 32))
):
    own = TritonWeight(*rounded, bits=bits, dtype=torch.bfloat16)
    for rows in (1, 64, 64 * 64):  # split twice, and not
        own.multiply(torch.zeros(rows, 4096).bfloat16(), torch.zeros(512).bfloat16())
"""


@pytest.mark.slow
def test_launches_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """For Hopper, with its matrix instructions and loads that run ahead; nothing is run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 15


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_rounded_alike_on_both(scheme: str | int) -> None:
    """But for int4's groups in which two scales err alike, to the order of a sum."""
    weight = random(512, 2048).bfloat16()
    pairs = [rounded(scheme, each) for each in (weight, weight.cuda())]
    for cpu, gpu in zip(*pairs, strict=True):
        same = (cpu.float() == gpu.cpu().float()).double().mean()
        assert same == 1 if isinstance(scheme, str) else same > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_real_size_on_a_gpu(scheme: str | int, dtype: torch.dtype) -> None:
    """By its formula, a row the same bits at every number of rows, and captured as a graph."""
    values, scales = rounded(scheme, torch.randn(4096, 11008, device="cuda"))
    own, meant = packed(scheme, values, scales, dtype), dequantize(values, scales)
    x = torch.randn(600, 11008, device="cuda").to(dtype)  # many: one program adds up all splits
    together = own.multiply(x, dtype=torch.float32)
    exact, size = x.double() @ meant.double().T, x.double().abs() @ meant.double().abs().T
    assert ((together - exact).abs() <= TOLERANCE * size).all()
    for rows in (1, 2, 15, 16, 17, 32, 33, 64, 65, 128, 256):
        assert torch.equal(own.multiply(x[:rows], dtype=torch.float32), together[:rows])
    held = x[:8].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = own.multiply(held, dtype=torch.float32)
    held.copy_(x[100:108])
    graph.replay()
    assert torch.equal(y, together[100:108])
