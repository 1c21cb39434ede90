"""The GPU's kernels between a layer's matrix products, in Triton; triton_layers.py calls them.

Imported late, like triton_kernels.py. A program has rows of its own, whose sums are added up in an
order that the model alone decides: a row's bits depend on no other row and not on how many there
are. Arithmetic is float32.
"""

import triton
import triton.language as tl

_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def add_norm(
    hidden, update, weight, rows, summed, normed, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """Add two rows and RMS-norm the sum, as rounded to their type; grid (rows,).

    hidden, update  [n, SIZE]; without ADDED there is no update and no sum
    rows            [grid] int32, which rows; GATHERED: these only, and no sum is stored
    summed, normed  [n, SIZE]
    """
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHERED:
        source = tl.load(rows + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    kept = columns < SIZE
    at = source * SIZE + columns
    x = tl.load(hidden + at, mask=kept, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(update + at, mask=kept, other=0.0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        if not GATHERED:
            tl.store(summed + at, rounded, kept)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    x = x * scale * tl.load(weight + columns, mask=kept, other=0.0).to(tl.float32)
    tl.store(normed + row * SIZE + columns, x.to(normed.dtype.element_ty), kept)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate_and_store(
    qkv, positions, slots, cos, sin, q_weight, k_weight, q, pages_k, pages_v,
    page_head, page_slot, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate q and k, and store k and v; grid (tokens, blocks of heads).

    qkv    [n, HEADS + 2 KV_HEADS, HEAD_DIM]
    positions, slots  [n] int32
    cos, sin          [positions, HEAD_DIM / 2] float32
    q_weight, k_weight  [HEAD_DIM], read where NORMED
    q      [n, HEADS, HEAD_DIM]
    pages  [KV_HEADS, slots, HEAD_DIM], strides page_head, page_slot, 1
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    kv_head = head - tl.where(is_v, HEADS + KV_HEADS, HEADS)
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    kept = (head < HEADS + 2 * KV_HEADS)[:, None] & in_half[None, :]

    at = (token * (HEADS + 2 * KV_HEADS) + head[:, None]) * HEAD_DIM + half[None, :]
    own_low = tl.load(qkv + at, mask=kept, other=0.0).to(tl.float32)
    own_high = tl.load(qkv + at + HALF, mask=kept, other=0.0).to(tl.float32)
    low, high = own_low, own_high
    if NORMED:
        total = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.rsqrt(total / HEAD_DIM + eps)[:, None]
        q_low = tl.load(q_weight + half, mask=in_half, other=0.0).to(tl.float32)
        k_low = tl.load(k_weight + half, mask=in_half, other=0.0).to(tl.float32)
        q_high = tl.load(q_weight + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        k_high = tl.load(k_weight + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        low = low * scale * tl.where(is_q[:, None], q_low[None, :], k_low[None, :])
        high = high * scale * tl.where(is_q[:, None], q_high[None, :], k_high[None, :])
    angle = tl.load(positions + token).to(tl.int64) * HALF + half
    c = tl.load(cos + angle, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=in_half, other=0.0)[None, :]
    turned_low = tl.where(is_v[:, None], own_low, low * c - high * s)
    turned_high = tl.where(is_v[:, None], own_high, high * c + low * s)

    dtype = q.dtype.element_ty
    turned_low, turned_high = turned_low.to(dtype), turned_high.to(dtype)
    q_at = (token * HEADS + head[:, None]) * HEAD_DIM + half[None, :]
    to_q = kept & is_q[:, None]
    tl.store(q + q_at, turned_low, to_q)
    tl.store(q + q_at + HALF, turned_high, to_q)
    slot = tl.load(slots + token).to(tl.int64)
    page_at = kv_head.to(tl.int64)[:, None] * page_head + slot * page_slot + half[None, :]
    to_k = kept & (~is_q & ~is_v)[:, None]
    tl.store(pages_k + page_at, turned_low, to_k)
    tl.store(pages_k + page_at + HALF, turned_high, to_k)
    to_v = kept & is_v[:, None]
    tl.store(pages_v + page_at, turned_low, to_v)
    tl.store(pages_v + page_at + HALF, turned_high, to_v)


@triton.jit
def gate(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(gate) * up; grid (rows, blocks of columns).

    gate_up  [n, 2 INNER], the gate first; out [n, INNER]
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = columns < INNER
    at = gate_up + row * 2 * INNER + columns
    x = tl.load(at, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(at + INNER, mask=kept, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u / 2)) / 2 is a sigmoid
        u = _SQRT_8_OVER_PI * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-u))
    else:
        tl.static_assert(ACTIVATION == "relu")
        x = tl.where(x < 0, 0.0, x)  # a maximum would hide NaN
    tl.store(out + row * INNER + columns, (x * up).to(out.dtype.element_ty), kept)
