// Products of rows by a packed weight: y = x @ weight.T + bias + residual.
//
// A weight stands in panels of 32 outputs. A panel goes through the inputs in order, and what one
// 4-byte word of a row multiplies is 128 bytes side by side, read once for up to 12 rows:
//
//     float32    1 input  x 32 outputs             a word of x is 1 input
//     bfloat16   2 inputs x 32 outputs             2 inputs
//     int8       4 inputs x 32 outputs             4 inputs, rounded to 8 bits
//     int4       8 inputs x 32 outputs             see `Nibbles`
//
// Every output is one sum in the order of the inputs, so a row's result is the same bits whatever
// rows it is multiplied with.
#pragma once

#include <cmath>

#include "common.h"

constexpr size_t LINE = 64, STEP = 2 * LINE, WIDTH = 32;

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

struct Weight {
    int64_t kind, inputs, outputs;
    int64_t group_size;     // int4: inputs that share a scale
    const char *panels;     // [outputs / 32][inputs / those of a step][128 bytes]
    const float *scales;    // int8: [outputs]; int4: [inputs / group_size][outputs, padded to 32]
    const int32_t *offsets; // int8: [outputs] 128 times the sum of an output's values
    const void *bias;       // [outputs] of x's type, or null

    size_t num_panels() const { return (outputs + WIDTH - 1) / WIDTH; }
};

// Where results go, [rows, outputs]: the bias and the residual are added on the way.
template <class E, class O> struct Target {
    O *out;
    const E *residual; // laid out like out, or null

    // sums [rows][2 * panels], vectors
    void put(const Weight &w, size_t row, int rows, size_t panel, int panels,
             const __m512 *sums) const {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 2 * panels; c++) {
                size_t column = panel * WIDTH + c * 16, at = (row + r) * w.outputs + column;
                __mmask16 mask = lanes((ptrdiff_t)w.outputs - (ptrdiff_t)column);
                __m512 y = sums[r * 2 * panels + c];
                if (w.bias != nullptr)
                    y = _mm512_add_ps(y, load(static_cast<const E *>(w.bias) + column, mask));
                if (residual != nullptr) y = _mm512_add_ps(y, load(residual + at, mask));
                store(out + at, y, mask);
            }
    }
};

constexpr int MAX_SUMS = 24; // vectors in registers at once

// --- one step: 16 outputs' sums += 16 outputs' weights times a word of x --------------------------

struct Floats {
    using Sum = __m512;
    static INLINE Sum zero() { return _mm512_setzero_ps(); }
    static INLINE Sum dot(Sum sum, __m512i w, int32_t x) {
        __m512 a = _mm512_castsi512_ps(_mm512_set1_epi32(x));
        return _mm512_fmadd_ps(a, _mm512_castsi512_ps(w), sum);
    }
};

#ifdef __AVX512BF16__
struct Bfloats {
    using Sum = __m512;
    static INLINE Sum zero() { return _mm512_setzero_ps(); }
    static INLINE Sum dot(Sum sum, __m512i w, int32_t x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
    }
};
#endif

#ifdef __AVX512VNNI__
struct Bytes {
    using Sum = __m512i;
    static INLINE Sum zero() { return _mm512_setzero_si512(); }
    static INLINE Sum dot(Sum sum, __m512i w, int32_t x) {
        return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), w);
    }
};
#endif

// R rows by P panels -> sums [R][2 P], vectors.
template <class T, int R, int P>
void multiply_tile(const int32_t *x, size_t stride, const char *panels, size_t words,
                   typename T::Sum *to) {
    typename T::Sum sum[R][2 * P];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < 2 * P; c++) sum[r][c] = T::zero();
    for (size_t k = 0; k < words; k++) {
        __m512i w[2 * P];
        UNROLL for (int c = 0; c < 2 * P; c++)
            w[c] = _mm512_load_si512(panels + (c / 2 * words + k) * STEP + c % 2 * LINE);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < 2 * P; c++)
                sum[r][c] = T::dot(sum[r][c], w[c], x[r * stride + k]);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < 2 * P; c++) to[r * 2 * P + c] = sum[r][c];
}

// int4: a step's 2 lines hold 16 outputs each, of 8 inputs: 16-bit number l of a line has in its
// i-th nibble the value for output l / 2 and input 2 i + l % 2. A shift and a look-up make of it
// what `Bfloats` multiplies. Sums within a group are scaled when the group ends.
template <class E> struct Nibbles;

#ifdef __AVX512BF16__
template <> struct Nibbles<bfloat16> {
    static constexpr size_t WORDS = 4; // of x in a step
    static INLINE __m512 dot(__m512 sum, __m512i pairs, const int32_t *x) {
        return Bfloats::dot(sum, pairs, x[0]);
    }
};
#endif

template <> struct Nibbles<float> {
    static constexpr size_t WORDS = 8;
    static INLINE __m512 dot(__m512 sum, __m512i pairs, const int32_t *x) {
        sum = Floats::dot(sum, _mm512_slli_epi32(pairs, 16), x[0]);
        return Floats::dot(sum, _mm512_and_epi32(pairs, _mm512_set1_epi32(0xffff0000)), x[1]);
    }
};

// -8 ... 7 in bfloat16, twice: a look-up reads five bits, of which the fifth is the next nibble's.
alignas(64) static const uint16_t NIBBLE[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};

template <class E, int R, int P>
void multiply_nibbles(const int32_t *x, size_t stride, const char *panels, const float *scales,
                      size_t padded, size_t groups, size_t steps, __m512 *to) {
    using N = Nibbles<E>;
    const __m512i table = _mm512_load_si512(NIBBLE);
    __m512 total[R][2 * P];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < 2 * P; c++) total[r][c] = _mm512_setzero_ps();
    for (size_t g = 0; g < groups; g++) {
        __m512 sum[R][2 * P];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < 2 * P; c++) sum[r][c] = _mm512_setzero_ps();
        for (size_t k = g * steps; k < (g + 1) * steps; k++) {
            __m512i w[2 * P];
            UNROLL for (int c = 0; c < 2 * P; c++)
                w[c] = _mm512_load_si512(panels + (c / 2 * groups * steps + k) * STEP +
                                         c % 2 * LINE);
            UNROLL for (int i = 0; i < 4; i++)
                UNROLL for (int c = 0; c < 2 * P; c++) {
                    __m512i index = _mm512_srli_epi32(w[c], 4 * i);
                    __m512i pairs = _mm512_permutexvar_epi16(index, table);
                    UNROLL for (int r = 0; r < R; r++)
                        sum[r][c] = N::dot(sum[r][c], pairs,
                                           x + r * stride + k * N::WORDS + i * N::WORDS / 4);
                }
        }
        UNROLL for (int c = 0; c < 2 * P; c++) {
            __m512 scale = load(scales + g * padded + c * 16);
            UNROLL for (int r = 0; r < R; r++)
                total[r][c] = _mm512_fmadd_ps(sum[r][c], scale, total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < 2 * P; c++) to[r * 2 * P + c] = total[r][c];
}

// --- all rows by a member's panels ----------------------------------------------------------------

// Calls tile.run<R, P>(row, panel) over rows and panels, P panels at a time. Few rows take one
// panel, so that a member reads memory as one stream: 48 GB/s, with four streams 42.
template <int P, class Tile>
INLINE void run_rows(const Tile &tile, size_t count, size_t row, size_t panel) {
    switch (count) {
    case 1: return tile.template run<1, P>(row, panel);
    case 2: return tile.template run<2, P>(row, panel);
    case 3: return tile.template run<3, P>(row, panel);
    }
    if constexpr (P <= 2)
        switch (count) {
        case 4: return tile.template run<4, P>(row, panel);
        case 5: return tile.template run<5, P>(row, panel);
        case 6: return tile.template run<6, P>(row, panel);
        }
    if constexpr (P == 1 && Tile::MOST_ROWS > 6)
        switch (count) {
        case 7: return tile.template run<7, P>(row, panel);
        case 8: return tile.template run<8, P>(row, panel);
        case 9: return tile.template run<9, P>(row, panel);
        case 10: return tile.template run<10, P>(row, panel);
        case 11: return tile.template run<11, P>(row, panel);
        case 12: return tile.template run<12, P>(row, panel);
        }
}

template <class Tile> void run_tiles(Member member, const Tile &tile, size_t rows, size_t panels) {
    size_t panel = member.begin(panels), end = member.end(panels);
    // More rows than a tile's pass several times over its panels, which stay in a cache meanwhile.
    size_t most = rows <= Tile::MOST_ROWS ? Tile::MOST_ROWS : 6, width = Tile::width(rows);
    size_t blocks = (rows + most - 1) / most;
    while (panel < end) {
        while (panel + width > end) width /= 2;
        for (size_t b = 0; b < blocks; b++) {
            size_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
            if (width == 4) run_rows<4>(tile, count, row, panel);
            else if (width == 2) run_rows<2>(tile, count, row, panel);
            else run_rows<1>(tile, count, row, panel);
        }
        panel += width;
    }
}

template <class T, class E, class O> struct FloatTile {
    static constexpr size_t MOST_ROWS = 12;
    static size_t width(size_t rows) { return rows <= MOST_ROWS ? 1 : 2; }
    const Weight &w;
    const int32_t *x;
    size_t stride, words; // in 4-byte words
    Target<E, O> to;

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        __m512 sums[R * 2 * P];
        multiply_tile<T, R, P>(x + row * stride, stride, w.panels + panel * words * STEP, words,
                               sums);
        to.put(w, row, R, panel, P, sums);
    }
};

#ifdef __AVX512VNNI__
template <class E, class O> struct ByteTile {
    static constexpr size_t MOST_ROWS = 12;
    static size_t width(size_t rows) { return rows <= MOST_ROWS ? 1 : 2; }
    const Weight &w;
    const int32_t *x;
    size_t stride, words;
    const float *row_scales;
    Target<E, O> to;

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        __m512i sums[R * 2 * P];
        multiply_tile<Bytes, R, P>(x + row * stride, stride, w.panels + panel * words * STEP, words,
                                   sums);
        scale(row, R, panel, P, sums);
    }

    void scale(size_t row, int rows, size_t panel, int panels, const __m512i *sums) const {
        __m512 y[MAX_SUMS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 2 * panels; c++) {
                size_t column = panel * WIDTH + c * 16;
                __mmask16 mask = lanes((ptrdiff_t)w.outputs - (ptrdiff_t)column);
                __m512i sum = _mm512_sub_epi32(sums[r * 2 * panels + c],
                                               _mm512_maskz_loadu_epi32(mask, w.offsets + column));
                __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), load(w.scales + column, mask));
                y[r * 2 * panels + c] = _mm512_mul_ps(scaled, _mm512_set1_ps(row_scales[row + r]));
            }
        to.put(w, row, rows, panel, panels, y);
    }
};
#endif

template <class E, class O> struct NibbleTile {
    static constexpr size_t MOST_ROWS = 6;
    static size_t width(size_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
    const Weight &w;
    const int32_t *x;
    size_t stride; // in 4-byte words
    Target<E, O> to;

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        __m512 sums[R * 2 * P];
        multiply_nibbles<E, R, P>(x + row * stride, stride, w.panels + panel * w.inputs / 8 * STEP,
                                  w.scales + panel * WIDTH, w.num_panels() * WIDTH,
                                  w.inputs / w.group_size, w.group_size / 8, sums);
        to.put(w, row, R, panel, P, sums);
    }
};

// --- activations as bytes -------------------------------------------------------------------------

// Rows rounded to -127 ... 127 by their own largest value, plus 128. A row with a NaN has it for a
// scale, so that it is not taken for a number.
struct Rounded {
    uint8_t *values; // [rows][stride(inputs)]
    float *scales;   // [rows]

    static size_t width(size_t inputs) { return (inputs + 3) / 4 * 4; }
    static size_t stride(size_t inputs) { return spread(width(inputs)); }
};

template <class E>
void round_row(const E *x, size_t inputs, uint8_t *values, float *scale) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    __m512 largest = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (size_t k = 0; k < inputs; k += 16) {
        __m512 v = load(x + k, lanes(inputs - k));
        largest = _mm512_max_ps(largest, _mm512_andnot_ps(sign, v));
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    float most = nan ? NAN : _mm512_reduce_max_ps(largest);
    *scale = (most < 1e-30f ? 1e-30f : most) * (1.0f / 127);
    const __m512 inverse = _mm512_set1_ps(1.0f / *scale);
    size_t padded = Rounded::width(inputs);
    for (size_t k = 0; k < padded; k += 16) {
        __m512 v = _mm512_mul_ps(load(x + k, lanes(inputs - k)), inverse);
        __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(values + k, lanes(padded - k), _mm512_cvtepi32_epi8(i));
    }
}

template <class E>
void round_rows(Member member, const E *x, size_t stride, size_t rows, size_t inputs,
                Rounded to) {
    for (size_t row = member.begin(rows); row < member.end(rows); row++)
        round_row(x + row * stride, inputs, to.values + row * Rounded::stride(inputs),
                  to.scales + row);
}

// A member's part of the product. An int8 weight reads `rounded` in place of x.
template <class E, class O>
void multiply(Member member, const Weight &w, const E *x, size_t stride, Rounded rounded,
              size_t rows, Target<E, O> to) {
    auto words = reinterpret_cast<const int32_t *>(x);
    size_t word_stride = stride * sizeof(E) / 4;
    switch (w.kind) {
    case FLOAT32:
        if constexpr (sizeof(E) == 4)
            run_tiles(member,
                      FloatTile<Floats, E, O>{w, words, word_stride, (size_t)w.inputs, to}, rows,
                      w.num_panels());
        return;
#ifdef __AVX512BF16__
    case BFLOAT16:
        if constexpr (sizeof(E) == 2)
            run_tiles(member,
                      FloatTile<Bfloats, E, O>{w, words, word_stride, (size_t)(w.inputs + 1) / 2, to},
                      rows, w.num_panels());
        return;
#endif
#ifdef __AVX512VNNI__
    case INT8:
        run_tiles(member,
                  ByteTile<E, O>{w, reinterpret_cast<const int32_t *>(rounded.values),
                                 Rounded::stride(w.inputs) / 4,
                                 Rounded::width(w.inputs) / 4, rounded.scales, to},
                  rows, w.num_panels());
        return;
#endif
    case INT4:
        run_tiles(member, NibbleTile<E, O>{w, words, word_stride, to}, rows, w.num_panels());
        return;
    }
}
