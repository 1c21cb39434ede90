// Tree attention over pages: the contract of ops/attention.py, one request's head group at a time.
//
// A query's scores, its softmax and its mix of values are each computed key by key in the keys'
// order, and a hidden key adds exactly nothing. So a node of a tree gets the same bits as the same
// token of a chain, whatever stands beside it: text does not depend on how it was drafted.
#pragma once

#include <atomic>
#include <cmath>

#include "linear.h"

struct Segment {
    int64_t queries, keys, prefix; // the region is keys prefix ... keys - 1
    const int64_t *slots;          // [keys] where they stand; null: a run that begins at `start`
    int64_t start;
    const uint8_t *mask;  // [queries][keys - prefix], 1: seen; null: a causal chain
    const int64_t *first; // [queries] the first key that a window leaves; null: none is left out

    size_t slot(size_t key) const { return slots == nullptr ? start + key : slots[key]; }
};

template <class E> struct Pages {
    const E *keys, *values; // [kv_heads][slots][head_dim]
    size_t head_stride, head_dim;
};

// Work for a whole team: pieces of a head group's queries, taken one after the other.
template <class E> struct Attention {
    const Segment *segments;
    size_t num_segments, heads, kv_heads;
    float scale;
    Pages<E> pages;
    const E *q;
    size_t q_stride;
    E *out; // [tokens][out_stride], heads side by side
    size_t out_stride;
};

// What scores are made of: words of keys by words of queries.
template <class E> struct Scores : Floats {
    static constexpr bool IS_OWN = std::is_same_v<E, float>; // or widened to float32
    static size_t words(size_t head_dim) { return head_dim; }
    static INLINE Words load_key(const E *key, size_t word, Lanes some) {
        return as_words(load(key + word, some));
    }
};
#ifdef HAS_PAIRS
template <> struct Scores<bfloat16> : Bfloats {
    static size_t words(size_t head_dim) { return head_dim / 2; }
    static INLINE Words load_key(const bfloat16 *key, size_t word, Lanes some) {
        return load_words(key + word * 2, some);
    }
};
#endif

// LANES keys against R queries: columns [words] of transposed keys, q rows of as many words.
template <class E, int R>
INLINE void score_block(const int32_t *const *q, size_t words, const Words *columns, Vector *to) {
    Vector sum[R];
    UNROLL for (int r = 0; r < R; r++) sum[r] = splat(0.0f);
    for (size_t w = 0; w < words; w++) {
        Words k = columns[w];
        UNROLL for (int r = 0; r < R; r++) sum[r] = Scores<E>::dot(sum[r], k, broadcast(q[r][w]));
    }
    UNROLL for (int r = 0; r < R; r++) to[r] = sum[r];
}

template <class E>
void score_rows(const int32_t *const *q, size_t rows, size_t words, const Words *columns,
                Vector *to) {
    for (size_t r = 0; r < rows; r += 8)
        with_count<8>(rows - r, [&](auto some) {
            score_block<E, some()>(q + r, words, columns, to + r);
        });
}

// R queries' weights times values, C vectors wide, of the last of which `tail` is meant.
template <class E, int R, int C>
INLINE void mix_block(const Segment &s, const E *values, size_t head_dim, size_t begin, size_t end,
                      const float *p, size_t p_stride, E *const *out, Lanes tail) {
    Vector sum[R][C];
    float total[R];
    UNROLL for (int r = 0; r < R; r++) {
        total[r] = 0;
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = splat(0.0f);
    }
    for (size_t k = begin; k < end; k++) {
        const E *value = values + s.slot(k) * head_dim;
        Vector v[C];
        UNROLL for (int c = 0; c < C; c++) v[c] = load(value + c * LANES, c == C - 1 ? tail : ALL);
        UNROLL for (int r = 0; r < R; r++) {
            float weight = p[r * p_stride + k];
            total[r] += weight;
            UNROLL for (int c = 0; c < C; c++) sum[r][c] = fma(splat(weight), v[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++)
            store(out[r] + c * LANES, sum[r][c] / splat(total[r]), c == C - 1 ? tail : ALL);
}

constexpr int MIX_VECTORS = 4, MIX_ROWS = MAX_SUMS / MIX_VECTORS;

template <class E, int C>
void mix_rows(const Segment &s, const E *values, size_t head_dim, size_t begin, size_t end,
              const float *p, size_t p_stride, E *const *out, size_t rows, Lanes tail) {
    for (size_t r = 0; r < rows; r += MIX_ROWS)
        with_count<MIX_ROWS>(rows - r, [&](auto some) {
            mix_block<E, some(), C>(s, values, head_dim, begin, end, p + r * p_stride, p_stride,
                                    out + r, tail);
        });
}

constexpr size_t MOST_HEAD_DIM = 512;
constexpr size_t TILE_ROWS = 16; // a tile's, as far as whole groups allow
constexpr size_t MOST_ROWS = 128; // heads of a group at most

// A bit for each of the first `count` lanes.
INLINE uint32_t first_bits(ptrdiff_t count) {
    return count >= LANES ? (1u << LANES) - 1 : count <= 0 ? 0 : (1u << count) - 1;
}

// Some queries of one head group: queries first ... first + count - 1 of a segment.
template <class E>
void attend_tile(const Attention<E> &a, const Segment &s, size_t row, size_t kv_head, size_t first,
                 size_t count, Scratch &scratch) {
    const size_t group = a.heads / a.kv_heads, rows = count * group, dim = a.pages.head_dim;
    const size_t words = Scores<E>::words(dim);
    const E *keys = a.pages.keys + kv_head * a.pages.head_stride;
    const E *values = a.pages.values + kv_head * a.pages.head_stride;
    const size_t end = s.mask == nullptr ? s.prefix + first + count : s.keys;
    size_t begin = 0;
    if (s.first != nullptr) {
        begin = s.first[first];
        for (size_t i = 1; i < count; i++)
            if ((size_t)s.first[first + i] < begin) begin = s.first[first + i];
        begin -= begin % LANES;
    }
    const size_t p_stride = (end + LANES - 1) / LANES * LANES;
    const size_t wide = Scores<E>::IS_OWN ? 0 : spread(dim * 4) / 4; // a query as float32
    float *p = scratch.get<float>(rows * (p_stride + wide)), *widened = p + rows * p_stride;
    const int32_t *q[MOST_ROWS];
    E *out[MOST_ROWS];
    float most[MOST_ROWS];
    for (size_t r = 0; r < rows; r++) {
        size_t token = row + first + r / group, head = kv_head * group + r % group;
        const E *query = a.q + token * a.q_stride + head * dim;
        q[r] = reinterpret_cast<const int32_t *>(query);
        if (!Scores<E>::IS_OWN) {
            widen_row(query, dim, widened + r * wide);
            q[r] = reinterpret_cast<const int32_t *>(widened + r * wide);
        }
        out[r] = a.out + token * a.out_stride + head * dim;
        most[r] = -INFINITY;
    }

    Words columns[MOST_HEAD_DIM];
    Vector scores[TILE_ROWS];
    for (size_t k = begin; k < end; k += LANES) {
        const E *key[LANES];
        for (size_t i = 0; i < LANES; i++)
            key[i] = keys + s.slot(k + i < end ? k + i : end - 1) * dim;
        for (size_t w = 0; w < words; w += LANES) {
            Words block[LANES];
            Lanes some = lanes(words - w);
            UNROLL for (int i = 0; i < LANES; i++) block[i] = Scores<E>::load_key(key[i], w, some);
            transpose(block);
            for (size_t i = 0; i < LANES && w + i < words; i++) columns[w + i] = block[i];
        }
        for (size_t r0 = 0; r0 < rows; r0 += TILE_ROWS) {
            size_t some = rows - r0 < TILE_ROWS ? rows - r0 : TILE_ROWS;
            score_rows<E>(q + r0, some, words, columns, scores);
            for (size_t i = 0; i < some; i++) {
                size_t r = r0 + i, query = first + r / group;
                uint32_t seen = first_bits(end - k);
                if (s.mask == nullptr) {
                    seen = first_bits((ptrdiff_t)(s.prefix + query + 1) - (ptrdiff_t)k);
                } else if (k + LANES > (size_t)s.prefix) {
                    const uint8_t *mask = s.mask + query * (s.keys - s.prefix);
                    for (size_t j = 0; j < LANES && k + j < end; j++)
                        if (k + j >= (size_t)s.prefix && !mask[k + j - s.prefix]) seen &= ~(1 << j);
                }
                if (s.first != nullptr) seen &= ~first_bits(s.first[query] - (int64_t)k);
                Vector score = hide(scores[i] * splat(a.scale), seen);
                store(p + r * p_stride + k, score);
                float best = highest(score);
                most[r] = best > most[r] ? best : most[r];
            }
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t k = begin; k < end; k += LANES) {
            float *at = p + r * p_stride + k;
            store(at, exp(load(at) - splat(most[r])));
        }
    constexpr size_t WIDE = MIX_VECTORS * LANES;
    for (size_t d = 0; d < dim;) {
        size_t some = dim - d >= WIDE ? WIDE : LANES;
        if (some == WIDE)
            mix_rows<E, MIX_VECTORS>(s, values + d, dim, begin, end, p, p_stride, out, rows, ALL);
        else
            mix_rows<E, 1>(s, values + d, dim, begin, end, p, p_stride, out, rows, lanes(dim - d));
        d += some;
        for (size_t r = 0; r < rows; r++) out[r] += some;
    }
}

// A member's part; `next` is shared by the team and 0 at the beginning.
template <class E> void attend(const Attention<E> &a, std::atomic<int64_t> &next, Scratch &scratch) {
    const size_t group = a.heads / a.kv_heads;
    const size_t most = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
    int64_t mine = next++, passed = 0;
    size_t row = 0;
    for (size_t i = 0; i < a.num_segments; i++) {
        const Segment &s = a.segments[i];
        const int64_t tiles = (s.queries + most - 1) / most, work = tiles * a.kv_heads;
        for (; mine < passed + work; mine = next++) {
            // The longest first: the last queries of a chain see most.
            size_t tile = tiles - 1 - (mine - passed) / a.kv_heads;
            size_t first = tile * most, left = s.queries - first;
            attend_tile(a, s, row, (mine - passed) % a.kv_heads, first, left < most ? left : most,
                        scratch);
        }
        passed += work;
        row += s.queries;
    }
}
