"""Twin: the GPU kernel attends as the reference does, on a GPU or in Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specinfer.errors import DependencyError
from specinfer.ops import triton_attention
from specinfer.ops.attention import Segment, attention_reference
from specinfer.ops.triton_attention import TritonPlan, lay_out, pack_bits, partial_sums
from tests.test_attention import ancestors, causal_segment, random_inputs, segments_of

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_ERROR = 1e-5
# Of the norm; the interpreter cuts off what a GPU rounds to nearest
BFLOAT16_ERROR = 4e-3 if DEVICE.type == "cuda" else 8e-3
SCALE = 0.3


def plan_of(segments: list[Segment], groups: int, **options: Any) -> TritonPlan:
    layout = lay_out(segments, groups, sum(segment.num_queries for segment in segments))
    meta = torch.from_numpy(layout.meta).to(DEVICE)
    return TritonPlan(layout, meta, scale=SCALE, num_groups=groups, **options)


def attended(plan: TritonPlan, inputs: tuple[Tensor, ...], window: int | None = None) -> Tensor:
    return plan(*(each.to(DEVICE) for each in inputs), window).cpu()


def assert_twins(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, atol=FLOAT32_ERROR, rtol=FLOAT32_ERROR)
    elif actual.numel():
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error <= BFLOAT16_ERROR


def random_tree(num_nodes: int, prefix: int, slots: slice | np.ndarray, seed: int = 0) -> Segment:
    rng = np.random.default_rng(seed)
    mask = ancestors([-1, *(int(rng.integers(node)) for node in range(1, num_nodes))])
    positions = (prefix - 1 + mask.sum(1)).tolist()
    return Segment(num_nodes, slots, prefix, mask, positions, positions)


def scattered(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(160)[:count]


@settings(max_examples=15)
@given(
    segments_of(),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 3, 7, 100]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_plan_equals_reference(
    segments: list[Segment],
    groups: int,
    kv_heads: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs = random_inputs(segments, groups, kv_heads, dtype, seed)
    expected = attention_reference(*inputs, segments, SCALE, window)
    assert_twins(attended(plan_of(segments, groups), inputs, window), expected)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("slots", [slice(3, 143), scattered(140)], ids=["run", "scattered"])
def test_more_nodes_than_a_word_has_bits_and_a_tile_has_rows(
    slots: slice | np.ndarray, window: int | None
) -> None:
    segments = [random_tree(100, 40, slots)]
    layout = lay_out(segments, 3, 100)
    assert (layout.tile, layout.num_items) == (128, 3)
    inputs = random_inputs(segments, 3, 1, torch.float32, 0)
    expected = attention_reference(*inputs, segments, SCALE, window)
    assert_twins(attended(plan_of(segments, 3), inputs, window), expected)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, torch.float32), (1, torch.float32), (30, torch.float32), (30, torch.bfloat16)],
)
def test_split_prefixes(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 16)
    segments = [
        random_tree(5, 40, scattered(45)),
        causal_segment(1, 0),
        random_tree(3, 20, slice(60, 83), 1),
        causal_segment(1, 49),
    ]
    assert lay_out(segments, 3, 10).num_partials == 3 * (5 * 3 + 3 * 2 + 4)
    inputs = random_inputs(segments, 3, 2, dtype, 0)
    expected = attention_reference(*inputs, segments, SCALE, window)
    assert_twins(attended(plan_of(segments, 3), inputs, window), expected)


@pytest.mark.parametrize(
    ("window", "softcap", "has_alibi"),
    [(None, 1.5, False), (None, None, True), (6, None, True), (6, 1.5, True)],
)
def test_capped_and_tilted_scores(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None, has_alibi: bool
) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 16)
    segments = [random_tree(9, 12, scattered(21)), causal_segment(5, 20)]
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.06]) if has_alibi else None
    inputs = random_inputs(segments, 2, 2, torch.float32, 0)
    inputs[0].mul_(3)  # far into the cap
    expected = attention_reference(*inputs, segments, SCALE, window, softcap=softcap, alibi=alibi)
    plain = attention_reference(*inputs, segments, SCALE, window)
    assert not torch.equal(plain, expected)
    on_device = None if alibi is None else alibi.to(DEVICE)
    plan = plan_of(segments, 2, softcap=softcap, alibi=on_device)
    assert_twins(attended(plan, inputs, window), expected)


def test_a_node_depends_on_the_keys_it_sees_and_on_no_other() -> None:
    """Bit by bit: each key is changed, and exactly the rows whose mask has it change."""
    segment = random_tree(40, 10, scattered(50))
    q, k, v = random_inputs([segment], 1, 1, torch.float32, 0)
    plan = plan_of([segment], 1)
    before = attended(plan, (q, k, v))
    seen = segment.visible(None)
    assert seen is not None
    for key in range(0, 50, 7):
        changed = v.clone()
        changed[:, segment.slots[key]] += 100.0
        rows = (attended(plan, (q, k, changed)) != before).flatten(1).any(1)
        assert rows.tolist() == seen[:, key].tolist()


def test_a_flipped_bit_of_the_mask_shows() -> None:
    segment = random_tree(40, 3, slice(0, 43))
    assert segment.mask is not None
    inputs = random_inputs([segment], 1, 1, torch.float32, 0)
    mask = segment.mask.copy()
    mask[39, 35] ^= True  # in the second word
    other = replace(segment, mask=mask)
    actual, expected = (attended(plan_of([each], 1), inputs) for each in (segment, other))
    assert (actual != expected).flatten(1).any(1).nonzero().flatten().tolist() == [39]


def test_who_shares_the_batch_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 16)
    # Of the same tile: a GPU has other instructions for other tiles, which add up otherwise.
    one, others = random_tree(5, 60, scattered(65)), [causal_segment(6, 5), causal_segment(1, 90)]
    q, k, v = random_inputs([*others, one], 2, 1, torch.float32, 0)
    together = attended(plan_of([*others, one], 2), (q, k, v))
    alone = attended(plan_of([one], 2), (q[7:], k, v))
    assert torch.equal(together[7:], alone)


def test_a_long_chunk_reads_no_key_behind_its_tile() -> None:
    segments = [causal_segment(100, 30)]
    layout = lay_out(segments, 2, 100)
    items = layout.meta[4 : 4 + 16 * layout.num_items].reshape(-1, 16)
    assert items[:, 4].tolist() == [30 + 64, 30 + 100]  # stop
    inputs = random_inputs(segments, 2, 1, torch.float32, 0)
    expected = attention_reference(*inputs, segments, SCALE)
    assert_twins(attended(plan_of(segments, 2), inputs), expected)


@pytest.mark.parametrize("num_programs", [1, 3, 50])
def test_programs_stride_through_whatever_work_there_is(num_programs: int) -> None:
    segments = [causal_segment(1, n) for n in range(7)]
    inputs = random_inputs(segments, 1, 2, torch.float32, 0)
    expected = attention_reference(*inputs, segments, SCALE)
    actual = attended(plan_of(segments, 1, num_programs=num_programs), inputs)
    assert_twins(actual, expected)


def test_a_plan_follows_what_is_written_over_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a captured graph needs it: other items, other splits, padding behind them."""
    monkeypatch.setattr(triton_attention, "SPLIT_KEYS", 16)
    first = [causal_segment(8, 0)]
    second = [random_tree(5, 40, scattered(45)), causal_segment(1, 3)]
    layout, other = lay_out(first, 2, 8), lay_out(second, 2, 8)
    meta = torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    plan = TritonPlan(
        layout,
        meta,
        scale=SCALE,
        num_groups=2,
        num_programs=2,
        partials=partial_sums(100, 2, 8, DEVICE),
    )
    for segments, each in ((first, layout), (second, other), (first, layout)):
        meta[: len(each.meta)] = torch.from_numpy(each.meta)
        used = sum(segment.num_queries for segment in segments)
        q, k, v = random_inputs(segments, 2, 2, torch.float32, 0)
        padded = torch.cat([q, torch.full((8 - used, *q.shape[1:]), torch.nan)])
        actual = attended(plan, (padded, k, v))[:used]
        assert_twins(actual, attention_reference(q, k, v, segments, SCALE))


@pytest.mark.parametrize("head_dim", [80, 16])
def test_head_dims_that_are_no_power_of_two(head_dim: int) -> None:
    segments = [random_tree(5, 20, scattered(25))]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 4, head_dim, generator=generator)
    k, v = torch.randn(2, 2, 160, head_dim, generator=generator)
    expected = attention_reference(q, k, v, segments, SCALE)
    assert_twins(attended(plan_of(segments, 2), (q, k, v)), expected)


def test_many_heads_of_a_group_share_a_tile() -> None:
    segments = [causal_segment(3, 4)]
    inputs = random_inputs(segments, 71, 1, torch.float32, 0)  # Falcon's
    expected = attention_reference(*inputs, segments, SCALE)
    assert_twins(attended(plan_of(segments, 71), inputs), expected)


def test_a_batch_may_be_empty() -> None:
    assert attended(plan_of([], 2), random_inputs([], 2, 2, torch.float32, 0)).shape == (0, 4, 8)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 99))
def test_bits_are_the_mask(num_queries: int, num_keys: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((num_queries, num_keys)) < 0.5
    words = pack_bits(mask)
    assert words.shape == (num_queries, -(-num_keys // 32))
    key = np.arange(num_keys)
    assert ((words[:, key // 32] >> (key % 32) & 1) == mask).all()


@settings(max_examples=50)
@given(segments_of(), st.sampled_from([1, 4, 40]), st.integers(0, 3))
def test_every_tile_meets_every_key_once(
    segments: list[Segment], groups: int, num_padding: int
) -> None:
    num_tokens = sum(segment.num_queries for segment in segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "SPLIT_KEYS", 8)
        layout = lay_out(segments, groups, num_tokens + num_padding)
    items = layout.meta[4 : 4 + 16 * layout.num_items].reshape(-1, 16)
    met: dict[int, list[int]] = {}
    for token, num_queries, _, start, stop, *_ in items.tolist():
        for each in range(token, token + num_queries):
            met.setdefault(each, []).extend(range(start, stop))
    keys = [s.num_keys for s in segments for _ in range(s.num_queries)]
    assert sorted(met) == list(range(num_tokens))
    for token, own in met.items():
        assert own == list(range(len(own)))  # in order, none twice
        assert len(own) <= keys[token]
    assert all(item[1] * groups <= layout.tile for item in items)


def test_nothing_imports_triton_before_a_gpu_needs_it() -> None:
    code = (
        "import sys, specinfer.run.runner, specinfer.ops.triton_attention as each;"
        "assert 'triton' not in sys.modules;"
        "sys.modules['triton'] = None;"
        "each._import_kernels()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{DependencyError.__name__}: attention on a GPU needs triton" in run.stderr
    assert "pip install 'specinfer[gpu]'" in run.stderr


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specinfer.ops import triton_kernels

def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    strides = ("q_token", "q_head", "page_head", "page_slot")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in strides
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})

types = dict.fromkeys(("q", "pages_k", "pages_v", "out"), "*bf16")
types |= dict.fromkeys(("sums", "peaks", "slopes"), "*fp32")
types |= {"meta": "*i32", "scale": "fp32", "softcap": "fp32"}
sizes = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128}
for flag in (False, True):
    flags = dict.fromkeys(("WINDOWED", "CAPPED", "TILTED"), flag) | {"WIDENED": False}
    made = compiled(triton_kernels.attend, types, {**sizes, **flags, "BLOCK_M": 128, "BLOCK_N": 64})
    print("wgmma" in made.asm["ptx"], "cp.async" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
print(len(compiled(triton_kernels.combine, types, sizes).asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """For Hopper, with its matrix instructions and loads that run ahead; nothing is run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 7


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 700])
def test_a_real_size_on_a_gpu(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    rng = np.random.default_rng(0)
    slots = rng.permutation(20_000)
    segments = [
        random_tree(33, 5_000, slots[:5_033]),
        random_tree(200, 100, slots[6_000:6_300], 1),
        causal_segment(1, 9_000),
        causal_segment(500, 1_500),
    ]
    num_tokens = sum(segment.num_queries for segment in segments)
    q = torch.randn(num_tokens, 32, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, 8, 20_000, head_dim, device="cuda").to(dtype)
    expected = attention_reference(q.float(), k, v, segments, head_dim**-0.5, window)
    layout = lay_out(segments, 4, num_tokens)
    meta = torch.from_numpy(layout.meta).to("cuda")
    actual = TritonPlan(layout, meta, scale=head_dim**-0.5, num_groups=4)(q, k, v, window)
    error = (actual.float() - expected).norm() / expected.norm()
    assert error <= BFLOAT16_ERROR
