"""Twin: the GPU's kernels between the products compute what the plain layers do.

On a GPU where there is one, else in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.models.architecture import Rope
from specinfer.models.layers import ACTIVATIONS, RMSNorm, Rotary, rotate
from specinfer.ops.triton_layers import Places, add_norm, gate, norm_rows, rotate_and_store

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
POSITIONS = 50
FLOAT32_ERROR = 1e-6 if DEVICE.type == "cpu" else 4e-6  # a GPU's exp, rsqrt and division
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_twins(actual: Tensor, exact: Tensor) -> None:
    """Equal to a result in float32, but for sums' order and one rounding.

    The interpreter cuts off what a GPU rounds to nearest.
    """
    error = FLOAT32_ERROR if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.float(), exact, atol=2e-6, rtol=error)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_norm(size: int, dtype: torch.dtype, seed: int = 9) -> RMSNorm:
    norm = RMSNorm(size, EPS).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * random(size, seed=seed))
    return norm


def exactly(norm: RMSNorm, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), norm.size, norm.weight.float(), norm.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 32), (1, 192), (5, 80), (3, 8192)])
def test_a_sum_and_its_norm(num_rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, update = (3 * random(num_rows, size, dtype=dtype, seed=seed) for seed in (0, 1))
    norm = random_norm(size, dtype)
    before = hidden.clone()
    summed, normed = add_norm(hidden, update, norm.weight, EPS)
    assert torch.equal(hidden, before)
    assert summed.dtype == normed.dtype == dtype
    assert_twins(summed, hidden.float() + update.float())
    assert_twins(normed, exactly(norm, summed))
    same, first = add_norm(hidden, None, norm.weight, EPS)
    assert same is hidden
    assert_twins(first, exactly(norm, hidden))


@pytest.mark.parametrize("rows", [[], [4], [2, 0, 2, 4]])
def test_some_rows_of_a_sum_normed(rows: list[int]) -> None:
    hidden, update = random(5, 48), random(5, 48, seed=1)
    norm, before = random_norm(48, torch.float32), hidden.clone()
    for each in (update, None):
        expected = add_norm(hidden, each, norm.weight, EPS)[1][rows]
        index = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        assert torch.equal(norm_rows(hidden, each, norm.weight, EPS, index), expected)
        assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim"),
    [(4, 2, 8), (3, 1, 80), (5, 5, 20), (1, 1, 2), (9, 3, 96), (2, 1, 256)],
)
def test_heads_are_normed_rotated_and_stored(
    num_heads: int, kv_heads: int, head_dim: int, is_normed: bool, dtype: torch.dtype
) -> None:
    num_tokens, num_slots = 3, 20
    positions, slots = torch.tensor([49, 0, 7]), torch.tensor([11, 3, 19])
    qkv = random(num_tokens, (num_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = [random_norm(head_dim, dtype, seed) for seed in (1, 2)] if is_normed else []
    rotary = Rotary(Rope(attention_factor=1.2), head_dim)
    pool = pool_of(kv_heads, num_slots, head_dim, dtype)
    q = rotate_and_store(
        qkv,
        places(rotary, positions, slots),
        pool.layer(0),
        (norms[0].weight, norms[1].weight) if norms else None,
        EPS,
    )

    parts = qkv.float().view(num_tokens, -1, head_dim).split([num_heads, kv_heads, kv_heads], 1)
    expected = list(parts)
    for index, norm in enumerate(norms):
        expected[index] = exactly(norm, expected[index])
    cos, sin = (each.to(DEVICE) for each in rotary(positions, torch.float32))
    assert q.dtype == dtype
    assert_twins(q, rotate(expected[0], cos, sin))
    k_pages, v_pages = pool.layer(0)
    assert_twins(k_pages[:, slots].transpose(0, 1), rotate(expected[1], cos, sin))
    assert torch.equal(v_pages[:, slots].transpose(0, 1).float(), expected[2])
    untouched = [slot for slot in range(num_slots) if slot not in slots.tolist()]
    assert all(pages[:, untouched].isnan().all() for pages in (k_pages, v_pages))


def places(rotary: Rotary, positions: Tensor, slots: Tensor) -> Places:
    cos, sin = (table.to(DEVICE) for table in rotary.table(POSITIONS))
    return Places(positions.to(DEVICE, torch.int32), slots.to(DEVICE, torch.int32), cos, sin)


def pool_of(kv_heads: int, num_slots: int, head_dim: int, dtype: torch.dtype) -> KVPool:
    pool = KVPool(
        num_layers=1,
        kv_heads=kv_heads,
        num_slots=num_slots,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    for pages in pool.layer(0):
        pages.fill_(torch.nan)
    return pool


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "inner"), [(0, 8), (3, 48), (2, 1500)])
def test_gates(num_rows: int, inner: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = random(num_rows, 2 * inner, dtype=dtype)
    gate_up[:, :inner] *= 4
    out = gate(gate_up, activation)
    assert out.dtype == dtype
    left, right = gate_up.float().chunk(2, -1)
    assert_twins(out, ACTIVATIONS[activation](left) * right)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_out_and_what_is_no_number(activation: str) -> None:
    """Whoever looks for a row that is not finite has to find it behind any activation."""
    x = torch.tensor([[-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4, torch.nan]], device=DEVICE)
    out = gate(torch.cat((x, torch.ones_like(x)), -1), activation)
    torch.testing.assert_close(out, ACTIVATIONS[activation](x), equal_nan=True)


def test_a_row_depends_on_no_other_row() -> None:
    """Bit by bit: rows alone, among others, and at other places."""
    hidden, update = (
        random(9, 96, dtype=torch.bfloat16),
        random(9, 96, dtype=torch.bfloat16, seed=1),
    )
    weight, rows = random_norm(96, torch.bfloat16).weight, [3, 8, 0]
    for all_rows, some in zip(
        add_norm(hidden, update, weight, EPS),
        add_norm(hidden[rows], update[rows], weight, EPS),
        strict=True,
    ):
        assert torch.equal(all_rows[rows], some)
    assert torch.equal(gate(hidden, "silu")[rows], gate(hidden[rows], "silu"))

    rotary, norms = Rotary(Rope(), 8), (random(8), random(8, seed=1))
    positions, slots = torch.arange(9), torch.arange(9)
    together, alone = (pool_of(3, 9, 8, torch.float32) for _ in range(2))
    qkv = random(9, 12 * 8)
    q = rotate_and_store(qkv, places(rotary, positions, slots), together.layer(0), norms, EPS)
    own = places(rotary, positions[rows], slots[rows])
    assert torch.equal(q[rows], rotate_and_store(qkv[rows], own, alone.layer(0), norms, EPS))
    for actual, expected in zip(alone.layer(0), together.layer(0), strict=True):
        assert torch.equal(actual[:, rows], expected[:, rows])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specinfer.ops import triton_layer_kernels as kernels

def compiled(kernel, others, constants, num_warps):
    names = kernel.arg_names
    signature = {name: others.get(name, "*bf16") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name] in ("*bf16", "*fp32", "i32")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": num_warps}
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    print("ld.global.v4" in asm["ptx"], "ld.local" not in asm["ptx"], len(asm["cubin"]) > 0)

norm = {"rows": "*i32", "eps": "fp32"}
for added, gathered in ((True, False), (True, True), (False, False)):
    sizes = {"SIZE": 4096, "BLOCK": 4096, "ADDED": added, "GATHERED": gathered}
    compiled(kernels.add_norm, norm, sizes, 8)
places = {"positions": "*i32", "slots": "*i32", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
places |= {"page_head": "i32", "page_slot": "i32"}
for normed in (False, True):
    sizes = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_HEADS": 4, "BLOCK_HALF": 64}
    compiled(kernels.rotate_and_store, places, sizes | {"NORMED": normed}, 1)
for activation in ("silu", "gelu", "gelu_tanh", "relu"):
    sizes = {"INNER": 11008, "BLOCK": 1024, "ACTIVATION": activation}
    compiled(kernels.gate, {}, sizes, 4)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """For Hopper, with loads of 16 bytes and nothing spilled; nothing is run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 27


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_real_sizes_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    n, heads, kv_heads, size, inner = 300, 32, 8, 5120, 13824
    hidden, update = random(n, size, dtype=dtype), random(n, size, dtype=dtype, seed=1)
    norm = random_norm(size, dtype)
    summed, normed = add_norm(hidden, update, norm.weight, EPS)
    assert torch.equal(summed, hidden + update)
    assert_twins(normed, exactly(norm, summed))
    gate_up = random(n, 2 * inner, dtype=dtype)
    left, right = gate_up.float().chunk(2, -1)
    assert_twins(gate(gate_up, "silu"), ACTIVATIONS["silu"](left) * right)

    positions, slots = torch.arange(n) % POSITIONS, torch.randperm(2 * n)[:n]
    rotary, pool = Rotary(Rope(), head_dim), pool_of(kv_heads, 2 * n, head_dim, dtype)
    qkv = random(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q = rotate_and_store(qkv, places(rotary, positions, slots), pool.layer(0), None, EPS)
    parts = qkv.float().view(n, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    cos, sin = (each.to(DEVICE) for each in rotary(positions, torch.float32))
    assert_twins(q, rotate(parts[0], cos, sin))
    k_pages, v_pages = (pages[:, slots].transpose(0, 1) for pages in pool.layer(0))
    assert_twins(k_pages, rotate(parts[1], cos, sin))
    assert torch.equal(v_pages.float(), parts[2])
