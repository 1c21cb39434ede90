// Products of rows by a packed weight: y = x @ weight.T + bias + residual.
//
// A weight stands in panels of 32 outputs. A panel goes through the inputs in order, and a step of
// it is 128 bytes side by side, read once for some rows:
//
//     float32    1 input  x 32 outputs
//     bfloat16   2 inputs x 32 outputs
//     int8       4 inputs x 32 outputs
//     int4       8 inputs x 32 outputs    16-bit number l has in its i-th nibble the value for
//                                         output l / 2 and input 2 i + l % 2, plus 8
//
// Every output is one sum in the order of the inputs, so a row's result is the same bits whatever
// rows it is multiplied with.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.h"

constexpr size_t LINE = LANES * 4, STEP = 128, WIDTH = 32; // bytes, bytes, outputs
constexpr int VECTORS = WIDTH / LANES;                     // of a panel

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

struct Weight {
    int64_t kind, inputs, outputs;
    int64_t group_size;     // int4: inputs that share a scale
    const char *panels;     // [outputs / 32][inputs / those of a step][128 bytes]
    const float *scales;    // int8: [outputs]; int4: [inputs / group_size][outputs, padded to 32]
    const int32_t *offsets; // int8: [outputs] 128 times the sum of an output's values
    const void *bias;       // [outputs] of x's type, or null

    size_t num_panels() const { return (outputs + WIDTH - 1) / WIDTH; }
    size_t num_groups() const { return inputs / group_size; }
    size_t num_steps() const {
        size_t each = kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : kind == INT8 ? 4 : 8;
        return (inputs + each - 1) / each;
    }
    const char *panel(size_t index) const { return panels + index * num_steps() * STEP; }
};

// Where results go, [rows, outputs]: the bias and the residual are added on the way.
template <class E, class O> struct Target {
    O *out;
    const E *residual; // laid out like out, or null

    // sums [rows][panels][VECTORS]
    void put(const Weight &w, size_t row, int rows, size_t panel, int panels,
             const Vector *sums) const {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < panels * VECTORS; c++) {
                size_t column = panel * WIDTH + c * LANES, at = (row + r) * w.outputs + column;
                Lanes some = lanes((ptrdiff_t)w.outputs - (ptrdiff_t)column);
                Vector y = sums[r * panels * VECTORS + c];
                if (w.bias != nullptr)
                    y = y + load(static_cast<const E *>(w.bias) + column, some);
                if (residual != nullptr) y = y + load(residual + at, some);
                store(out + at, y, some);
            }
    }
};

// --- one step -------------------------------------------------------------------------------------
//
// What a step's words are to a row: `WORDS` parts one after the other, each of which times a word
// of the row is added to the sums. Unless these are the row's own (`IS_OWN`), `prepare` makes them.

struct Floats {
    using Sum = Vector;
    static constexpr int WORDS = 1;
    static INLINE Sum zero() { return splat(0.0f); }
    static INLINE Words part(Words w, int) { return w; }
    static INLINE Sum dot(Sum sum, Words part, Words x) {
        return fma(as_floats(part), as_floats(x), sum);
    }
};

#ifdef HAS_PAIRS
struct Bfloats : Floats {
    static constexpr bool IS_OWN = true;
    static INLINE Sum dot(Sum sum, Words part, Words x) { return dot_pairs(sum, part, x); }
};
#else
struct Bfloats : Floats { // by way of float32
    static constexpr bool IS_OWN = false;
    static constexpr int WORDS = 2;
    static constexpr uint32_t HIGH = 0xffff0000;
    static INLINE Words part(Words w, int i) {
        return i == 0 ? shift_left(w, 16) : bits_of(w, &HIGH);
    }
};
#endif

struct Bytes {
    using Sum = Words;
    static INLINE Sum zero() { return broadcast(0); }
#ifdef HAS_BYTES
    static constexpr int WORDS = 1; // of 4 bytes
    static INLINE Words part(Words w, int) { return w; }
    static INLINE Sum dot(Sum sum, Words part, Words x) { return dot_bytes(sum, part, x); }
    static INLINE void store(int32_t *words, size_t k, Words x) { store_bytes(words + k / 4, x); }
#else
    // Of 2 times 16 bits: inputs 0 and 2, then 1 and 3. Sums of two products of bytes, which
    // AVX2 has, saturate at 16 bits.
    static constexpr int WORDS = 2;
    static INLINE Words part(Words w, int i) { return i == 0 ? even_bytes(w) : odd_bytes(w); }
    static INLINE Sum dot(Sum sum, Words part, Words x) { return add(sum, dot_shorts(part, x)); }
    static INLINE void store(int32_t *words, size_t k, Words x) { store_crossed(words + k / 2, x); }
#endif
};

// int4 by rows of type E. Sums within a group are scaled when the group ends.
template <class E> struct Nibbles : Floats {
    static constexpr bool IS_OWN = false;
    static constexpr int WORDS = 8;
    // Two instructions for a vector of weights: a nibble is left where it stands (but the last,
    // which would have a sign) and becomes a float, too large by a power of two by which the row's
    // number is divided. That 8 stands for 0 is mended by the sum of a group's inputs.
    static constexpr uint32_t BITS[WORDS] = {0xf,   0xf0000,   0xf0,   0xf00000,
                                             0xf00, 0xf000000, 0xf000, 0xf000000};
    static constexpr float FACTORS[WORDS] = {1.0f,    0x1p-16f, 0x1p-4f,  0x1p-20f,
                                             0x1p-8f, 0x1p-24f, 0x1p-12f, 0x1p-24f};
    static INLINE Words part(Words w, int i) {
        if (i == WORDS - 1) w = shift_right(w, 4);
        return as_words(to_floats(bits_of(w, BITS + i)));
    }
};

#ifdef HAS_PAIRS
template <> struct Nibbles<bfloat16> : Bfloats {
    static constexpr int WORDS = 4;
    static INLINE Words part(Words w, int i) { return look_up(shift_right(w, 4 * i)); }
};
#endif

// Has a step come to the second-level cache.
INLINE void fetch_step(const char *step) {
    UNROLL for (size_t i = 0; i < STEP; i += 64) __builtin_prefetch(step + i, 0, 2);
}

// Calls f with a constant between 1 and MOST that is `count`, or with MOST where that is more.
template <int MOST, int R = 1, class F> INLINE void with_count(size_t count, const F &f) {
    if constexpr (R < MOST) {
        if (count != R) return with_count<MOST, R + 1>(count, f);
    }
    f(std::integral_constant<int, R>());
}

// R rows' sums go on over steps begin ... end - 1 of P panels, which stand `apart` bytes. If it
// fetches, as many steps from `ahead` on come from memory meanwhile.
template <class T, int R, int P, bool FETCHES = false>
INLINE void go_on(typename T::Sum (&sum)[R][P * VECTORS], const int32_t *x, size_t stride,
                  const char *panels, size_t apart, size_t begin, size_t end,
                  const char *ahead = nullptr) {
    constexpr int COLUMNS = P * VECTORS;
    auto at = [&](size_t k, int c) {
        return load_line(panels + c / VECTORS * apart + k * STEP + c % VECTORS * LINE);
    };
    for (size_t k = begin; k < end; k++) {
        const int32_t *word = x + k * T::WORDS;
        if constexpr (FETCHES) fetch_step(ahead + (k - begin) * STEP);
        if constexpr (R > COLUMNS) { // a word of x at a time
            Words w[COLUMNS], part[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; c++) w[c] = at(k, c);
            UNROLL for (int i = 0; i < T::WORDS; i++) {
                UNROLL for (int c = 0; c < COLUMNS; c++) part[c] = T::part(w[c], i);
                UNROLL for (int r = 0; r < R; r++) {
                    Words own = broadcast(word[r * stride + i]);
                    UNROLL for (int c = 0; c < COLUMNS; c++)
                        sum[r][c] = T::dot(sum[r][c], part[c], own);
                }
            }
        } else { // a vector of weights at a time
            UNROLL for (int i = 0; i < T::WORDS; i++) {
                FORGET; // rather than keep vectors for their later parts
                Words own[R];
                UNROLL for (int r = 0; r < R; r++) own[r] = broadcast(word[r * stride + i]);
                UNROLL for (int c = 0; c < COLUMNS; c++) {
                    Words part = hold(T::part(at(k, c), i));
                    UNROLL for (int r = 0; r < R; r++)
                        sum[r][c] = T::dot(sum[r][c], part, own[r]);
                }
            }
        }
    }
}

// Where a tile has much to compute, few of the lines that a processor fetches by itself are on their
// way at a time: from 6 rows on we fetch, so far ahead. 12 rows of bfloat16 took 1.5 times as long
// without, and a row or four would take longer with it.
constexpr int FETCHING = 12; // vectors of sums
constexpr size_t AHEAD = 8192;

// R rows by P panels of so many steps -> sums [R][P][VECTORS].
template <class T, int R, int P>
void multiply_tile(const int32_t *x, size_t stride, const char *panels, size_t steps,
                   typename T::Sum *to) {
    typename T::Sum sum[R][P * VECTORS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < P * VECTORS; c++) sum[r][c] = T::zero();
    constexpr bool FETCHES = P == 1 && R * VECTORS >= FETCHING;
    go_on<T, R, P, FETCHES>(sum, x, stride, panels, steps * STEP, 0, steps, panels + AHEAD);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < P * VECTORS; c++) to[r * P * VECTORS + c] = sum[r][c];
}

// More rows than a tile's by a panel -> sums [rows][VECTORS]. All tiles read a chunk of it from a
// cache while each fetches its share of the next: where tiles are of two rows, from the first-level
// one, and from the second-level one where they are of eight (of twelve, whose rows are more streams
// than a processor follows: 0.8 of the speed).
template <class T>
void multiply_rows(const int32_t *x, size_t stride, size_t rows, const char *panel, size_t steps,
                   typename T::Sum *to) {
    constexpr size_t MOST = LANES < 16 ? MAX_SUMS / VECTORS : 8, CHUNK = LANES < 16 ? 64 : 256;
    const size_t tiles = (rows + MOST - 1) / MOST, chunks = (steps + CHUNK - 1) / CHUNK;
    for (size_t i = 0; i < rows * VECTORS; i++) to[i] = T::zero();
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        const size_t begin = steps * chunk / chunks, end = steps * (chunk + 1) / chunks;
        for (size_t t = 0; t < tiles; t++) {
            const size_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
            const size_t from = (end - begin) * t / tiles, until = (end - begin) * (t + 1) / tiles;
            const size_t middle = begin + until - from;
            with_count<MOST>(height, [&](auto count) {
                typename T::Sum sum[count()][VECTORS], *mine = to + row * VECTORS;
                const int32_t *own = x + row * stride;
                const char *ahead = panel + (end + from) * STEP;
                UNROLL for (int r = 0; r < count(); r++)
                    UNROLL for (int c = 0; c < VECTORS; c++) sum[r][c] = mine[r * VECTORS + c];
                go_on<T, count(), 1, true>(sum, own, stride, panel, 0, begin, middle, ahead);
                go_on<T, count(), 1>(sum, own, stride, panel, 0, middle, end);
                UNROLL for (int r = 0; r < count(); r++)
                    UNROLL for (int c = 0; c < VECTORS; c++) mine[r * VECTORS + c] = sum[r][c];
            });
        }
    }
}

// The same of int4. offsets [R][groups]: what is added to a group's sums; unread where x is own.
template <class E, int R, int P>
void multiply_nibbles(const int32_t *x, size_t stride, const char *panels, const float *scales,
                      size_t padded, const float *offsets, size_t groups, size_t steps,
                      Vector *to) {
    using T = Nibbles<E>;
    UNROLL for (int i = 0; i < R * P * VECTORS; i++) to[i] = T::zero();
    for (size_t g = 0; g < groups; g++) {
        Vector sum[R][P * VECTORS];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < P * VECTORS; c++)
                sum[r][c] = T::IS_OWN ? T::zero() : splat(offsets[r * groups + g]);
        go_on<T, R, P>(sum, x, stride, panels, groups * steps * STEP, g * steps, (g + 1) * steps);
        UNROLL for (int c = 0; c < P * VECTORS; c++) {
            Vector scale = load(scales + g * padded + c * LANES);
            UNROLL for (int r = 0; r < R; r++)
                to[r * P * VECTORS + c] = fma(sum[r][c], scale, to[r * P * VECTORS + c]);
        }
    }
}

// --- all rows by a member's panels ----------------------------------------------------------------

constexpr size_t MANY = LANES < 16 ? 16 : 48; // rows by chunks

// Calls tile.run<R, P>(row, panel) over rows and panels, P panels at a time. Few rows take one
// panel, so that a member reads memory as one stream: 48 GB/s, with four streams 42.
template <int R, int P, class Tile>
INLINE void run_rows(const Tile &tile, size_t count, size_t row, size_t panel) {
    if constexpr (R * P * VECTORS <= Tile::SUMS) {
        if (count == R) return tile.template run<R, P>(row, panel);
        run_rows<R + 1, P>(tile, count, row, panel);
    }
}

template <class Tile> void run_tiles(Member member, const Tile &tile, size_t rows, size_t panels) {
    size_t panel = member.begin(panels), end = member.end(panels);
    // More rows than a tile's pass several times over its panels, which stay in a cache meanwhile.
    size_t width = Tile::width(rows), most = Tile::SUMS / VECTORS;
    bool by_chunks = rows > most && rows <= Tile::CHUNKED;
    if (by_chunks) most = MANY;
    else if (rows > most) most /= width;
    size_t blocks = (rows + most - 1) / most;
    while (panel < end) {
        while (panel + width > end) width /= 2;
        for (size_t b = 0; b < blocks; b++) {
            size_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
            if constexpr (Tile::CHUNKED > 0)
                if (by_chunks) {
                    tile.run_many(row, count, panel);
                    continue;
                }
            if (width == 4) run_rows<1, 4>(tile, count, row, panel);
            else if (width == 2) run_rows<1, 2>(tile, count, row, panel);
            else run_rows<1, 1>(tile, count, row, panel);
        }
        panel += width;
    }
}

// A tile's in floats and bytes. More rows are taken by chunks of a panel; where registers are many,
// very many rows, which wait for no memory, by tiles two panels wide, which reads rows less often.
struct Tiling {
    static constexpr size_t CHUNKED = LANES < 16 ? SIZE_MAX : MANY; // up to so many rows
    static constexpr int SUMS = MAX_SUMS;
    static size_t width(size_t rows) { return rows > CHUNKED ? 2 : 1; }
};

template <class T, class E, class O> struct FloatTile : Tiling {
    const Weight &w;
    const int32_t *x;
    size_t stride, steps; // stride in 4-byte words
    Target<E, O> to;

    FloatTile(const Weight &w, const int32_t *x, size_t stride, Target<E, O> to)
        : w(w), x(x), stride(stride), steps(w.num_steps()), to(to) {}

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        Vector sums[R * P * VECTORS];
        multiply_tile<T, R, P>(x + row * stride, stride, w.panel(panel), steps, sums);
        to.put(w, row, R, panel, P, sums);
    }

    void run_many(size_t row, size_t rows, size_t panel) const {
        Vector sums[MANY * VECTORS];
        multiply_rows<T>(x + row * stride, stride, rows, w.panel(panel), steps, sums);
        to.put(w, row, rows, panel, 1, sums);
    }
};

template <class E, class O> struct ByteTile : Tiling {
    const Weight &w;
    const int32_t *x;
    size_t stride, steps;
    const float *row_scales;
    Target<E, O> to;

    ByteTile(const Weight &w, const int32_t *x, size_t stride, const float *row_scales,
             Target<E, O> to)
        : w(w), x(x), stride(stride), steps(w.num_steps()), row_scales(row_scales), to(to) {}

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        Words sums[R * P * VECTORS];
        multiply_tile<Bytes, R, P>(x + row * stride, stride, w.panel(panel), steps, sums);
        scale(row, R, panel, P, sums);
    }

    void run_many(size_t row, size_t rows, size_t panel) const {
        Words sums[MANY * VECTORS];
        multiply_rows<Bytes>(x + row * stride, stride, rows, w.panel(panel), steps, sums);
        scale(row, rows, panel, 1, sums);
    }

    void scale(size_t row, int rows, size_t panel, int panels, const Words *sums) const {
        Vector y[MANY * VECTORS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < panels * VECTORS; c++) {
                size_t column = panel * WIDTH + c * LANES, i = r * panels * VECTORS + c;
                Lanes some = lanes((ptrdiff_t)w.outputs - (ptrdiff_t)column);
                Words sum = subtract(sums[i], load_words(w.offsets + column, some));
                y[i] = to_floats(sum) * load(w.scales + column, some) * splat(row_scales[row + r]);
            }
        to.put(w, row, rows, panel, panels, y);
    }
};

template <class E, class O> struct NibbleTile {
    static constexpr size_t CHUNKED = 0;
    static constexpr int SUMS = LANES == 16 ? 12 : MAX_SUMS; // and as many scaled ones
    static size_t width(size_t rows) {
        size_t panels = 4;
        while (panels > 1 && rows * panels * VECTORS > SUMS) panels /= 2;
        return panels;
    }
    const Weight &w;
    const int32_t *x;
    size_t stride; // in 4-byte words
    const float *offsets;
    Target<E, O> to;

    template <int R, int P> INLINE void run(size_t row, size_t panel) const {
        Vector sums[R * P * VECTORS];
        multiply_nibbles<E, R, P>(x + row * stride, stride, w.panel(panel),
                                  w.scales + panel * WIDTH, w.num_panels() * WIDTH,
                                  offsets + row * w.num_groups(), w.num_groups(), w.group_size / 8,
                                  sums);
        to.put(w, row, R, panel, P, sums);
    }
};

// --- rows as a weight reads them ------------------------------------------------------------------

// int8 reads rows rounded to -127 ... 127 by their own largest value, plus 128, with their scale; a
// row with a NaN has it for a scale, so that it is not taken for a number. Others read float32, and
// int4 what its sums begin with beside it.
struct Prepared {
    int32_t *words; // [rows][stride(weight)]
    float *numbers; // [rows][those of a row]: int8 its scale, int4 one per group

    // Whether a weight reads this in place of rows of type E.
    template <class E> static bool serves(const Weight &w) {
        switch (w.kind) {
        case FLOAT32: return false;
        case BFLOAT16: return !Bfloats::IS_OWN;
        case INT8: return true;
        default: return !Nibbles<E>::IS_OWN;
        }
    }

    static size_t stride(const Weight &w) { // in words
        int words = w.kind == INT8 ? Bytes::WORDS : w.kind == BFLOAT16 ? 2 : 8; // of a step
        return spread(w.num_steps() * words * 4) / 4;
    }

    static size_t count(const Weight &w) { return w.kind == INT4 ? w.num_groups() : 1; }
};

template <class E> void round_row(const E *x, size_t inputs, int32_t *words, float *scale) {
    Vector largest = splat(0.0f);
    uint32_t nans = 0;
    for (size_t k = 0; k < inputs; k += LANES) {
        Vector v = load(x + k, lanes(inputs - k));
        largest = max(largest, absolute(v));
        nans |= find_nans(v);
    }
    float most = nans ? NAN : highest(largest);
    *scale = (most < 1e-30f ? 1e-30f : most) * (1.0f / 127);
    const Vector inverse = splat(1.0f / *scale);
    for (size_t k = 0; k < inputs; k += LANES) {
        Vector v = load(x + k, lanes(inputs - k)) * inverse;
        Bytes::store(words, k, add(to_words(v), broadcast(128)));
    }
}

template <class E> void widen_row(const E *x, size_t inputs, float *to) {
    for (size_t k = 0; k < inputs; k += LANES) store(to + k, load(x + k, lanes(inputs - k)));
}

template <class E>
void divide_row(const E *x, const Weight &w, float *to, float *offsets) {
    float factors[16];
    for (int i = 0; i < 16; i++) factors[i] = Nibbles<float>::FACTORS[i % 8];
    for (size_t k = 0; k < (size_t)w.inputs; k += LANES)
        store(to + k, load(x + k, lanes(w.inputs - k)) * load(factors + k % 8));
    for (size_t g = 0; g < w.num_groups(); g++) {
        const E *from = x + g * w.group_size;
        Vector sum = splat(0.0f);
        for (size_t k = 0; k < (size_t)w.group_size; k += LANES)
            sum = sum + load(from + k, lanes(w.group_size - k));
        offsets[g] = total(sum) * -8.0f;
    }
}

template <class E>
void prepare(Member member, const Weight &w, const E *x, size_t stride, size_t rows, Prepared to) {
    for (size_t row = member.begin(rows); row < member.end(rows); row++) {
        const E *from = x + row * stride;
        int32_t *words = to.words + row * Prepared::stride(w);
        float *numbers = to.numbers + row * Prepared::count(w);
        if (w.kind == INT8) round_row(from, w.inputs, words, numbers);
        else if (w.kind == INT4) divide_row(from, w, (float *)words, numbers);
        else widen_row(from, w.inputs, (float *)words);
    }
}

// A member's part of the product. A weight that `prepared` serves reads it in place of x.
template <class E, class O>
void multiply(Member member, const Weight &w, const E *x, size_t stride, Prepared prepared,
              size_t rows, Target<E, O> to) {
    auto words = reinterpret_cast<const int32_t *>(x);
    size_t word_stride = stride * sizeof(E) / 4;
    if (Prepared::serves<E>(w)) {
        words = prepared.words;
        word_stride = Prepared::stride(w);
    }
    auto run = [&](auto tile) { run_tiles(member, tile, rows, w.num_panels()); };
    switch (w.kind) {
    case FLOAT32:
        if constexpr (sizeof(E) == 4) run(FloatTile<Floats, E, O>(w, words, word_stride, to));
        return;
    case BFLOAT16:
        if constexpr (sizeof(E) == 2) run(FloatTile<Bfloats, E, O>(w, words, word_stride, to));
        return;
    case INT8: return run(ByteTile<E, O>(w, words, word_stride, prepared.numbers, to));
    case INT4: return run(NibbleTile<E, O>{w, words, word_stride, prepared.numbers, to});
    }
}
