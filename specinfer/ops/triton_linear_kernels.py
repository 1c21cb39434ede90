"""The GPU's products with rounded weights, in Triton; triton_linear.py says what they are given.

Imported late, and run by the interpreter without a GPU, as `triton_kernels.py` is.

A *panel* is BLOCK_N outputs, a *step* 128 of its inputs: BLOCK_N rows of WORDS words of 32 bits. A
word holds two *pairs* of int8 or fp8 values or four of int4, a pair in the same place of the word's
two halves, so that one operation makes two values, side by side as matrix instructions take them.
Outputs are the rows of these instructions: the same ones serve any number of the batch's rows.
"""

import torch
import triton
import triton.language as tl

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

FP8 = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these are run by the interpreter, whose products know no bfloat16."""


@triton.jit
def _halves(words, NARROW: tl.constexpr, TYPE: tl.constexpr):
    """words [n, w] uint32 -> [n, 2 w] NARROW as TYPE, the lower half of each word first."""
    pair = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    bits = pair.reshape(words.shape[0], 2 * words.shape[1])
    return _floats(bits, NARROW, TYPE)


@triton.jit
def _floats(bits, NARROW: tl.constexpr, TYPE: tl.constexpr):
    """uint16 -> the NARROW floats they are, as TYPE."""
    if tl.float32 == TYPE and tl.bfloat16 == NARROW:  # the interpreter's own loses subnormals
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return bits.to(NARROW, bitcast=True).to(TYPE)


@triton.jit
def _values(
    words, PAIR: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """words [n, w] uint32 -> the values of one pair of each, [n, 2 w], exactly.

    NARROW  float16 or bfloat16; TYPE: what is returned, this or float32

    An integer in a float's lowest bits is added to it. e4m3's exponent and mantissa are moved to
    where NARROW's are, and a product makes up for the other bias, of subnormals too: its own
    conversion is for Ada and newer, and takes longer.
    """
    IS_HALF: tl.constexpr = tl.float16 == NARROW
    if KIND == INT4:
        low = (words >> (4 * PAIR)) & 0x000F000F  # 0 … 15, 8 too many
        if IS_HALF:
            return _halves(low | 0x64006400, NARROW, TYPE) - 1032.0
        return _halves(low | 0x43004300, NARROW, TYPE) - 136.0
    if KIND == INT8:
        low = words >> (8 * PAIR)  # 0 … 255, 128 too many
        if IS_HALF:
            return _halves((low & 0x00FF00FF) | 0x64006400, NARROW, TYPE) - 1152.0
        # bfloat16 has room for seven bits: the eighth chooses what is taken away.
        base = _halves((low & 0x00800080) ^ 0x43804380, NARROW, TYPE)
        return _halves((low & 0x007F007F) | 0x43004300, NARROW, TYPE) - base
    if IS_HALF:
        if PAIR == 0:
            bits = ((words << 8) & 0x80008000) | ((words << 7) & 0x3F803F80)
        else:
            bits = (words & 0x80008000) | ((words >> 1) & 0x3F803F80)
        return _halves(bits, NARROW, TYPE) * 256.0
    if PAIR == 0:
        bits = ((words << 8) & 0x80008000) | ((words << 4) & 0x07F007F0)
    else:
        bits = (words & 0x80008000) | ((words >> 4) & 0x07F007F0)
    return _halves(bits, NARROW, TYPE) * 1.329227995784916e36  # 2 ** (127 - 7)


@triton.constexpr_function
def _scale_words(group_pairs):
    """Words of two scales, per output and step."""
    return max(1, 2 // group_pairs)


@triton.jit
def _sum(
    x, words, scales, first_step, last_step, rows, num_rows, num_inputs, x_row,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
    GROUP_PAIRS: tl.constexpr, NARROW: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One panel's values times x over a range of steps, in the inputs' order: [BLOCK_N, BLOCK_M].

    GROUP_PAIRS  pairs that share a scale, of int4
    """
    PAIRS: tl.constexpr = 4 if KIND == INT4 else 2
    outputs = tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, 2 * WORDS)
    places = outputs[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    x_places = inputs[:, None] + rows[None, :].to(tl.int64) * x_row
    held = rows[None, :] < num_rows
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(first_step, last_step):
        own = tl.load(words + step * (BLOCK_N * WORDS) + places)
        own = own.to(tl.uint32, bitcast=True)
        for PAIR in tl.static_range(PAIRS):
            first = (step * PAIRS + PAIR) * (2 * WORDS)
            there = held & ((first + inputs)[:, None] < num_inputs)
            own_x = tl.load(x + first + x_places, mask=there, other=0.0).to(TYPE)
            values = _values(own, PAIR, KIND, NARROW, TYPE)
            if KIND == INT4:
                if PAIR % (2 * GROUP_PAIRS) == 0:  # of two groups: smaller loads are not run ahead
                    word = step * _scale_words(GROUP_PAIRS) + PAIR // (2 * GROUP_PAIRS)
                    two = tl.load(scales + word * BLOCK_N + outputs).to(tl.uint32, bitcast=True)
                one = two >> 16 if PAIR // GROUP_PAIRS % 2 else two
                values *= _floats(one.to(tl.uint16), NARROW, TYPE)[:, None]
            total = tl.dot(values, own_x, total, input_precision="ieee")
    return total


@triton.jit
def _finish(
    total, scales, bias, outputs, num_outputs, KIND: tl.constexpr, BIASED: tl.constexpr
):  # fmt: skip
    """Apply what there is one of per output: total [BLOCK, n] of outputs [BLOCK, 1]."""
    held = outputs < num_outputs
    added = tl.zeros_like(total)
    if BIASED:
        added += tl.load(bias + outputs, mask=held, other=0.0).to(tl.float32)
    if KIND == INT4:
        return total + added
    scale = tl.load(scales + outputs, mask=held, other=0.0) + tl.zeros_like(total)
    return tl.fma(total, scale, added)  # said, so that no compiler chooses


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x, words, scales, bias, out, sums,
    num_rows, num_inputs, num_outputs, x_row, num_steps, split_steps,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
    GROUP_PAIRS: tl.constexpr, SPLIT: tl.constexpr, LOOPED: tl.constexpr, BIASED: tl.constexpr,
    NARROW: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Multiply rows by a weight; grid (blocks of rows, panels, splits where SPLIT).

    x       [num_rows, num_inputs], strides x_row, 1
    words   [panels, num_steps, BLOCK_N, WORDS] int32
    scales  [num_outputs] float32; of int4 [panels, num_steps, n, BLOCK_N] words of two NARROW ones
    out     [num_rows, num_outputs]; where SPLIT, instead sums [splits, num_rows, num_outputs]
            float32, each of split_steps steps
    LOOPED  a program goes through all splits and adds them up as `add_up` does
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    panel = tl.program_id(1)
    outputs = panel * BLOCK_N + tl.arange(0, BLOCK_N)
    words += panel.to(tl.int64) * num_steps * (BLOCK_N * WORDS)
    own_scales = scales
    if KIND == INT4:
        own_scales += panel.to(tl.int64) * num_steps * (_scale_words(GROUP_PAIRS) * BLOCK_N)
    if LOOPED:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for first in range(0, num_steps, split_steps):
            total += _sum(
                x, words, own_scales, first, tl.minimum(first + split_steps, num_steps), rows,
                num_rows, num_inputs, x_row, KIND, BLOCK_M, BLOCK_N, WORDS, GROUP_PAIRS, NARROW,
                TYPE,
            )  # fmt: skip
    else:
        first = tl.program_id(2) * split_steps
        total = _sum(
            x, words, own_scales, first, tl.minimum(first + split_steps, num_steps), rows,
            num_rows, num_inputs, x_row, KIND, BLOCK_M, BLOCK_N, WORDS, GROUP_PAIRS, NARROW, TYPE,
        )  # fmt: skip
    places = rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    held = (rows[:, None] < num_rows) & (outputs[None, :] < num_outputs)
    if SPLIT:
        sums += tl.program_id(2).to(tl.int64) * num_rows * num_outputs
        tl.store(sums + places, tl.trans(total), held)
    else:
        total = _finish(total, scales, bias, outputs[:, None], num_outputs, KIND, BIASED)
        tl.store(out + places, tl.trans(total).to(out.dtype.element_ty), held)


@triton.jit(do_not_specialize=["num_rows"])
def add_up(
    sums, scales, bias, out, num_rows, num_outputs, num_splits,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Add up the splits in their order; grid (rows, blocks of outputs)."""
    row = tl.program_id(0).to(tl.int64)
    outputs = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    held = outputs < num_outputs
    total = tl.zeros([BLOCK, 1], tl.float32)
    for split in range(num_splits):
        places = (split * num_rows + row) * num_outputs + outputs
        total += tl.load(sums + places, mask=held, other=0.0)
    total = _finish(total, scales, bias, outputs, num_outputs, KIND, BIASED)
    tl.store(out + row * num_outputs + outputs, total.to(out.dtype.element_ty), held)
