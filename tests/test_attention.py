"""Twin: the plan attends as the reference does, over ragged, odd and empty batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specinfer.ops import attention
from specinfer.ops.attention import AttentionPlan, Segment, attention_reference

FLOAT32_ERROR = 2e-6
BFLOAT16_ERROR = 1e-2  # of the largest value
NUM_SLOTS = 160


@st.composite
def parents_of(draw: st.DrawFn, size: int) -> list[int]:
    """A random tree: node 0 is the root, the others hang from an earlier one."""
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]


@st.composite
def segments_of(draw: st.DrawFn) -> list[Segment]:
    """Up to four requests that share the slots: chains, prompt chunks, trees, levels of trees."""
    count = draw(st.integers(0, 4))
    free = np.random.default_rng(draw(st.integers(0, 99))).permutation(NUM_SLOTS)
    segments, run_start, taken = [], 0, 0
    for _ in range(count):
        prefix = draw(st.integers(0, 20))
        num_nodes = draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["chain", "tree", "level"]))
        num_queries, mask = num_nodes, None
        positions = list(range(prefix, prefix + num_nodes))
        if kind != "chain":
            parents = draw(parents_of(num_nodes))
            seen = ancestors(parents)
            positions = [prefix + int(row.sum()) - 1 for row in seen]
            num_queries = draw(st.integers(1, num_nodes)) if kind == "level" else num_nodes
            mask = seen[num_nodes - num_queries :]
        keys = prefix + num_nodes
        if draw(st.booleans()):
            slots: slice | np.ndarray = slice(run_start, run_start + keys)
        else:
            slots = free[taken : taken + keys]
        run_start, taken = run_start + keys, taken + keys
        segments.append(
            Segment(
                num_queries=num_queries,
                slots=slots,
                prefix=prefix,
                mask=mask,
                query_positions=positions[num_nodes - num_queries :],
                region_positions=positions,
            )
        )
    return segments


def ancestors(parents: list[int]) -> np.ndarray:
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def random_inputs(
    segments: list[Segment], groups: int, kv_heads: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_pages, v_pages; what no segment owns is NaN, so that reading it shows."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, head_dim = sum(s.num_queries for s in segments), 8
    q = torch.randn(num_tokens, kv_heads * groups, head_dim, generator=generator)
    k, v = torch.randn(2, kv_heads, NUM_SLOTS, head_dim, generator=generator)
    owned = torch.zeros(NUM_SLOTS, dtype=torch.bool)
    for segment in segments:
        owned[segment.slots] = True
    k[:, ~owned] = v[:, ~owned] = torch.nan
    # As a layer hands it over: q is a strided view of a fused projection.
    q = torch.cat([q, q], 1)[:, : kv_heads * groups]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def plan_of(segments: list[Segment], groups: int, dtype: torch.dtype) -> AttentionPlan:
    return AttentionPlan(
        segments, scale=0.3, num_groups=groups, dtype=dtype, device=torch.device("cpu")
    )


@settings(max_examples=100)
@given(
    segments_of(),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 3, 7, 100]),
    st.integers(0, 99),
)
def test_plan_equals_reference(
    segments: list[Segment], groups: int, kv_heads: int, window: int | None, seed: int
) -> None:
    for dtype, error in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, BFLOAT16_ERROR)):
        q, k, v = random_inputs(segments, groups, kv_heads, dtype, seed)
        expected = attention_reference(q, k, v, segments, 0.3, window)
        plan = plan_of(segments, groups, dtype)
        for _ in range(2):  # the second layer uses what the first made ready
            actual = plan(q, k, v, window)
            assert actual.shape == expected.shape
            assert actual.dtype == dtype
            assert torch.isfinite(actual).all()
            limit = error if dtype == torch.float32 else error * float(v.nan_to_num().abs().max())
            assert ((actual - expected).abs() <= limit).all()


@settings(max_examples=40)
@given(segments_of(), st.sampled_from([None, 1, 3, 7]), st.integers(0, 99))
def test_reference_is_the_contract(segments: list[Segment], window: int | None, seed: int) -> None:
    """Key by key, with nothing but the words of the contract."""
    q, k, v = random_inputs(segments, 3, 1, torch.float32, seed)
    actual = attention_reference(q, k, v, segments, 0.3, window)
    row = 0
    for segment in segments:
        slots = np.arange(NUM_SLOTS)[segment.slots]
        positions = [*range(segment.prefix), *segment.region_positions]
        for query in range(segment.num_queries):
            seen = []
            for key, position in enumerate(positions):
                column = key - segment.prefix
                is_visible = column < 0 or (
                    column <= query if segment.mask is None else segment.mask[query, column]
                )
                behind = segment.query_positions[query] - position
                if is_visible and (window is None or behind < window):
                    seen.append(int(slots[key]))
            for head in range(3):
                weights = [math.exp(0.3 * float(q[row, head] @ k[0, slot])) for slot in seen]
                mixed = sum(w * v[0, slot] for w, slot in zip(weights, seen, strict=True))
                expected = mixed / sum(weights)
                torch.testing.assert_close(actual[row, head], expected, atol=1e-5, rtol=1e-5)
            row += 1


def causal_segment(num_queries: int, prefix: int = 0) -> Segment:
    positions = range(prefix, prefix + num_queries)
    return Segment(num_queries, slice(0, prefix + num_queries), prefix, None, positions, positions)


@pytest.mark.parametrize("prefix", [0, 50])
@pytest.mark.parametrize("window", [None, 16, 1000])
def test_long_prompt_chunks(prefix: int, window: int | None) -> None:
    segments = [causal_segment(100, prefix)]
    q, k, v = random_inputs(segments, 3, 2, torch.float32, 0)
    expected = attention_reference(q, k, v, segments, 0.3, window)
    actual = plan_of(segments, 3, torch.float32)(q, k, v, window)
    assert (actual - expected).abs().max().item() <= FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 2, 16])
@pytest.mark.parametrize(("num_queries", "prefix"), [(8, 1), (9, 40), (23, 5), (23, 0)])
def test_pieces_of_long_chunks(
    num_queries: int,
    prefix: int,
    window: int | None,
    scattered: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_MOST_QUERIES", 8)
    chunk = causal_segment(num_queries, prefix)
    if scattered:
        slots = np.random.default_rng(0).permutation(NUM_SLOTS - 20)[: chunk.num_keys]
        chunk = replace(chunk, slots=slots)
    tree = Segment(3, slice(150, 160), 7, ancestors([-1, 0, 0]), [7, 8, 8], [7, 8, 8])
    segments = [chunk, tree]
    q, k, v = random_inputs(segments, 3, 2, dtype, 0)
    expected = attention_reference(q, k, v, segments, 0.3, window).float()
    actual = plan_of(segments, 3, dtype)(q, k, v, window).float()
    scale = float(v.nan_to_num().abs().max())
    limit = FLOAT32_ERROR if dtype == torch.float32 else BFLOAT16_ERROR * scale
    assert (actual - expected).abs().max().item() <= limit


def test_masks_of_a_long_chunk_are_one() -> None:
    chunk = causal_segment(2048, 16384)
    plan = plan_of([chunk], 4, torch.bfloat16)
    biases = [part.bias for part in plan._prepare(None) if part.bias is not None]
    assert len(biases) == 8
    assert len({bias.untyped_storage().data_ptr() for bias in biases}) == 1
    assert biases[0].untyped_storage().nbytes() == 2 * 4 * 256 * (2048 + 16384)


def test_layers_with_different_windows_share_a_plan() -> None:
    segments = [causal_segment(9)]
    q, k, v = random_inputs(segments, 1, 2, torch.float32, 1)
    plan = plan_of(segments, 1, torch.float32)
    for window in (None, 2, None, 4, 2):
        expected = attention_reference(q, k, v, segments, 0.3, window)
        assert (plan(q, k, v, window) - expected).abs().max().item() <= FLOAT32_ERROR


def test_siblings_at_one_position_do_not_see_each_other_through_a_window() -> None:
    mask = ancestors([-1, 0, 0])
    segment = Segment(3, slice(0, 5), 2, mask, [2, 3, 3], [2, 3, 3])
    assert segment.visible(2).tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, True, False, True],
    ]
