"""The GPU's kernels of tree attention, in Triton; triton_attention.py says what they are given.

Imported late: this is the only module that needs triton, which torch brings along where there is
CUDA. With TRITON_INTERPRET=1 the same kernels run on a processor, slowly, for tests.

A *tile* is up to BLOCK_M rows, a row being one query and one of the heads that share a KV head; a
*work item* is a tile and a range of its keys. Items lie one after the other in one array of int32
and programs stride through them, so that a captured graph serves any number of items.
"""

import triton
import triton.language as tl

ITEM = tl.constexpr(16)
"""Numbers per work item; their order is `triton_attention._Item`'s."""

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these are run by the interpreter, whose products know no bfloat16."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    """Without libdevice, which the interpreter has not; absolute error 1e-7."""
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def _take(
    q, highest, total, mixed, slots, seen, distance, slopes, pages_k, pages_v, dims,
    slot_stride, held, scale, softcap,
    HEAD_DIM: tl.constexpr, CAPPED: tl.constexpr, TILTED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax, by streaming it once for all rows.

    slots     [BLOCK_N] where the keys stand; held [BLOCK_N]: which of them there are
    seen      [BLOCK_M, BLOCK_N]; distance likewise: positions that a key is behind
    highest   [BLOCK_M] in units of log 2; total [BLOCK_M]; mixed [BLOCK_M, BLOCK_D]
    """
    where = slots.to(tl.int64)[:, None] * slot_stride + dims[None, :]
    there = held[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(pages_k + where, mask=there, other=0.0)
    v = tl.load(pages_v + where, mask=there, other=0.0)
    if WIDENED:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32))) * scale
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        scores = softcap * _tanh(scores / softcap)
    if TILTED:
        scores -= slopes[:, None] * distance
    scores = tl.where(seen, scores * _LOG2_E, _HIDDEN)
    new = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new == _HIDDEN, 0.0, new)  # rows that have seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    if WIDENED:
        own = tl.dot(weights.to(tl.float32), v.to(tl.float32))
    else:
        own = tl.dot(weights, v, input_precision="ieee")
    return new, total, mixed * decay[:, None] + own


@triton.jit
def _slots_of(meta, first, table, keys, held):
    """Where keys stand: a run from `first`, or by a table."""
    tables = table + tl.zeros_like(keys)  # a condition of its own shape: masks broadcast no scalar
    listed = tl.load(meta + tables + keys, mask=held & (tables >= 0), other=0)
    return tl.where(tables < 0, first + keys, listed)


@triton.jit
def attend(
    q, pages_k, pages_v, out, sums, peaks, slopes, meta,
    q_token, q_head, page_head, page_slot, scale, softcap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TILTED: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """Attend each work item's rows to its keys; grid (programs, KV heads).

    q       [tokens, heads, HEAD_DIM], strides q_token, q_head, 1
    pages   [KV heads, slots, HEAD_DIM], strides page_head, page_slot, 1
    out     [tokens, heads, HEAD_DIM]; for items that are parts of a tile, instead
            sums [partial rows, KV heads, HEAD_DIM] and peaks [partial rows, KV heads, 2] float32
    slopes  [heads] float32, ALiBi's
    WIDENED  products are of float32, exactly what they are of bfloat16, for the interpreter
    """
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    pages_k += kv_head.to(tl.int64) * page_head
    pages_v += kv_head.to(tl.int64) * page_head
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    heads = kv_head * GROUP + rows % GROUP
    num_items = tl.load(meta)
    items = meta + tl.load(meta + 1)
    positions = meta + tl.load(meta + 2)
    tilt = tl.zeros([BLOCK_M], tl.float32)
    if TILTED:
        tilt = tl.load(slopes + heads)
    for index in range(tl.program_id(0), num_items, tl.num_programs(0)):
        item = items + index * ITEM
        first_token = tl.load(item)
        num_rows = tl.load(item + 1) * GROUP
        first_query = tl.load(item + 2)
        start = tl.load(item + 3)
        stop = tl.load(item + 4)
        prefix = tl.load(item + 5)
        first_slot = tl.load(item + 6)
        table = tl.load(item + 7)
        words = tl.load(item + 8)
        num_words = tl.load(item + 9)
        region = tl.load(item + 10)
        lowest = tl.load(item + 11)
        partial = tl.load(item + 12)

        in_tile = rows < num_rows
        token = first_token + rows // GROUP
        query = first_query + rows // GROUP
        position = tl.load(positions + token, mask=in_tile, other=0)
        q_rows = token.to(tl.int64) * q_token + heads * q_head
        q_tile = tl.load(
            q + q_rows[:, None] + dims[None, :],
            mask=in_tile[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        highest = tl.full([BLOCK_M], _HIDDEN, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        begin = start
        if WINDOWED:  # what is hidden from the tile's first query is hidden from all of it
            begin = tl.maximum(begin, lowest - window + 1)
        end = tl.minimum(stop, prefix)
        for key in range(begin, end, BLOCK_N):
            keys = key + columns
            held = keys < end
            distance = position[:, None] - keys[None, :]
            seen = held[None, :] & in_tile[:, None]
            if WINDOWED:
                seen = seen & (distance < window)
            slots = _slots_of(meta, first_slot, table, keys, held)
            highest, total, mixed = _take(
                q_tile, highest, total, mixed, slots, seen, distance, tilt, pages_k, pages_v,
                dims, page_slot, held, scale, softcap, HEAD_DIM, CAPPED, TILTED, WIDENED,
            )  # fmt: skip

        for key in range(tl.maximum(start, prefix), stop, BLOCK_N):
            keys = key + columns
            held = keys < stop
            column = keys - prefix
            both = held[None, :] & in_tile[:, None]
            if words < 0:
                seen = both & (column[None, :] <= query[:, None])
            else:
                at = words + query[:, None] * num_words + column[None, :] // 32
                word = tl.load(meta + at, mask=both, other=0)
                seen = both & (((word >> (column[None, :] % 32)) & 1) != 0)
            distance = position[:, None] - keys[None, :]
            if WINDOWED or TILTED:
                places = tl.load(meta + region + column, mask=held, other=0)
                distance = position[:, None] - places[None, :]
            if WINDOWED:
                seen = seen & (distance < window)
            slots = _slots_of(meta, first_slot, table, keys, held)
            highest, total, mixed = _take(
                q_tile, highest, total, mixed, slots, seen, distance, tilt, pages_k, pages_v,
                dims, page_slot, held, scale, softcap, HEAD_DIM, CAPPED, TILTED, WIDENED,
            )  # fmt: skip

        kept = in_tile[:, None] & (dims < HEAD_DIM)[None, :]
        if partial < 0:
            out_rows = (token.to(tl.int64) * num_kv_heads * GROUP + heads) * HEAD_DIM
            result = mixed / tl.where(in_tile, total, 1.0)[:, None]
            tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), kept)
        else:
            parts = (partial + rows).to(tl.int64) * num_kv_heads + kv_head
            tl.store(sums + parts[:, None] * HEAD_DIM + dims[None, :], mixed, kept)
            tl.store(peaks + parts * 2, highest, in_tile)
            tl.store(peaks + parts * 2 + 1, total, in_tile)


@triton.jit
def combine(
    out, sums, peaks, meta,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reduce the parts of split tiles, in the order of their keys; grid (tokens, heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    split = meta + tl.load(meta + 3) + token * 3
    first = tl.load(split)
    step = tl.load(split + 1)
    count = tl.load(split + 2)
    if count > 0:
        dims = tl.arange(0, BLOCK_D)
        kept = dims < HEAD_DIM
        num_kv_heads = num_heads // GROUP
        highest = tl.full([1], _HIDDEN, tl.float32)
        total = tl.zeros([1], tl.float32)
        mixed = tl.zeros([BLOCK_D], tl.float32)
        for part in range(count):
            row = (first + part * step + head % GROUP).to(tl.int64) * num_kv_heads + head // GROUP
            peak = tl.load(peaks + row * 2)
            new = tl.maximum(highest, peak)
            base = tl.where(new == _HIDDEN, 0.0, new)
            old_share = tl.exp2(highest - base)
            own_share = tl.exp2(peak - base)
            total = total * old_share + tl.load(peaks + row * 2 + 1) * own_share
            own = tl.load(sums + row * HEAD_DIM + dims, mask=kept, other=0.0)
            mixed = mixed * old_share + own * own_share
            highest = new
        at = (token.to(tl.int64) * num_heads + head) * HEAD_DIM
        tl.store(out + at + dims, (mixed / total).to(out.dtype.element_ty), kept)
