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

static INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int half = 0; half < 16; half += 8) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

template <class E> struct Dot;
template <> struct Dot<float> : Floats {};
#ifdef __AVX512BF16__
template <> struct Dot<bfloat16> : Bfloats {};
#endif

// 16 keys against R queries: columns [words][16] of transposed keys, q rows of as many words.
template <class E, int R>
INLINE void score_block(const int32_t *const *q, size_t words, const __m512i *columns, __m512 *to) {
    __m512 sum[R];
    UNROLL for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (size_t w = 0; w < words; w++) {
        __m512i k = columns[w];
        UNROLL for (int r = 0; r < R; r++) sum[r] = Dot<E>::dot(sum[r], k, q[r][w]);
    }
    UNROLL for (int r = 0; r < R; r++) to[r] = sum[r];
}

template <class E>
void score_rows(const int32_t *const *q, size_t rows, size_t words, const __m512i *columns,
                __m512 *to) {
    for (size_t r = 0; r < rows; r += 8) switch (rows - r) {
        case 1: score_block<E, 1>(q + r, words, columns, to + r); break;
        case 2: score_block<E, 2>(q + r, words, columns, to + r); break;
        case 3: score_block<E, 3>(q + r, words, columns, to + r); break;
        case 4: score_block<E, 4>(q + r, words, columns, to + r); break;
        case 5: score_block<E, 5>(q + r, words, columns, to + r); break;
        case 6: score_block<E, 6>(q + r, words, columns, to + r); break;
        case 7: score_block<E, 7>(q + r, words, columns, to + r); break;
        default: score_block<E, 8>(q + r, words, columns, to + r); break;
        }
}

// R queries' weights times values, C vectors of 16 wide, of the last of which `tail` is meant.
template <class E, int R, int C>
INLINE void mix_block(const Segment &s, const E *values, size_t head_dim, size_t begin, size_t end,
                      const float *p, size_t p_stride, E *const *out, __mmask16 tail) {
    __m512 sum[R][C];
    float total[R];
    UNROLL for (int r = 0; r < R; r++) {
        total[r] = 0;
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    }
    for (size_t k = begin; k < end; k++) {
        const E *value = values + s.slot(k) * head_dim;
        __m512 v[C];
        UNROLL for (int c = 0; c < C; c++) v[c] = load(value + c * 16, c == C - 1 ? tail : 0xffff);
        UNROLL for (int r = 0; r < R; r++) {
            float weight = p[r * p_stride + k];
            total[r] += weight;
            UNROLL for (int c = 0; c < C; c++)
                sum[r][c] = _mm512_fmadd_ps(_mm512_set1_ps(weight), v[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++)
            store(out[r] + c * 16, _mm512_div_ps(sum[r][c], _mm512_set1_ps(total[r])),
                  c == C - 1 ? tail : 0xffff);
}

template <class E, int C>
void mix_rows(const Segment &s, const E *values, size_t head_dim, size_t begin, size_t end,
              const float *p, size_t p_stride, E *const *out, size_t rows, __mmask16 tail) {
    for (size_t r = 0; r < rows; r += 6, p += 6 * p_stride, out += 6) switch (rows - r) {
        case 1: mix_block<E, 1, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        case 2: mix_block<E, 2, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        case 3: mix_block<E, 3, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        case 4: mix_block<E, 4, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        case 5: mix_block<E, 5, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        default: mix_block<E, 6, C>(s, values, head_dim, begin, end, p, p_stride, out, tail); break;
        }
}

constexpr size_t MOST_HEAD_DIM = 512;
constexpr size_t TILE_ROWS = 16; // a tile's, as far as whole groups allow
constexpr size_t MOST_ROWS = 128; // heads of a group at most

// Some queries of one head group: queries first ... first + count - 1 of a segment.
template <class E>
void attend_tile(const Attention<E> &a, const Segment &s, size_t row, size_t kv_head, size_t first,
                 size_t count, Scratch &scratch) {
    const size_t group = a.heads / a.kv_heads, rows = count * group, dim = a.pages.head_dim;
    const size_t words = dim * sizeof(E) / 4;
    const E *keys = a.pages.keys + kv_head * a.pages.head_stride;
    const E *values = a.pages.values + kv_head * a.pages.head_stride;
    const size_t end = s.mask == nullptr ? s.prefix + first + count : s.keys;
    size_t begin = 0;
    if (s.first != nullptr) {
        begin = s.first[first];
        for (size_t i = 1; i < count; i++)
            if ((size_t)s.first[first + i] < begin) begin = s.first[first + i];
        begin -= begin % 16;
    }
    const size_t p_stride = (end + 15) / 16 * 16;
    float *p = scratch.get<float>(rows * p_stride);
    const int32_t *q[MOST_ROWS];
    E *out[MOST_ROWS];
    float most[MOST_ROWS];
    for (size_t r = 0; r < rows; r++) {
        size_t token = row + first + r / group, head = kv_head * group + r % group;
        q[r] = reinterpret_cast<const int32_t *>(a.q + token * a.q_stride + head * dim);
        out[r] = a.out + token * a.out_stride + head * dim;
        most[r] = -INFINITY;
    }

    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    __m512i columns[MOST_HEAD_DIM];
    __m512 scores[TILE_ROWS];
    for (size_t k = begin; k < end; k += 16) {
        const char *key[16];
        for (size_t i = 0; i < 16; i++)
            key[i] = reinterpret_cast<const char *>(keys + s.slot(k + i < end ? k + i : end - 1) * dim);
        for (size_t w = 0; w < words; w += 16) {
            __m512i block[16];
            __mmask16 mask = lanes(words - w);
            UNROLL for (int i = 0; i < 16; i++)
                block[i] = _mm512_maskz_loadu_epi32(mask, key[i] + w * 4);
            transpose(block);
            for (size_t i = 0; i < 16 && w + i < words; i++) columns[w + i] = block[i];
        }
        for (size_t r0 = 0; r0 < rows; r0 += TILE_ROWS) {
            size_t some = rows - r0 < TILE_ROWS ? rows - r0 : TILE_ROWS;
            score_rows<E>(q + r0, some, words, columns, scores);
            for (size_t i = 0; i < some; i++) {
                size_t r = r0 + i, query = first + r / group;
                __mmask16 seen = lanes(end - k);
                if (s.mask == nullptr) {
                    seen = lanes((ptrdiff_t)(s.prefix + query + 1) - (ptrdiff_t)k);
                } else if (k + 16 > (size_t)s.prefix) {
                    const uint8_t *mask = s.mask + query * (s.keys - s.prefix);
                    for (size_t j = 0; j < 16 && k + j < end; j++)
                        if (k + j >= (size_t)s.prefix && !mask[k + j - s.prefix]) seen &= ~(1 << j);
                }
                if (s.first != nullptr) {
                    __m512i from = _mm512_set1_epi32((int)(s.first[query] - (int64_t)k));
                    seen = _mm512_mask_cmpge_epi32_mask(seen, lane, from);
                }
                __m512 score = _mm512_mul_ps(scores[i], _mm512_set1_ps(a.scale));
                score = _mm512_mask_blend_ps(seen, hidden, score);
                _mm512_storeu_ps(p + r * p_stride + k, score);
                float highest = _mm512_reduce_max_ps(score);
                most[r] = highest > most[r] ? highest : most[r];
            }
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t k = begin; k < end; k += 16) {
            float *at = p + r * p_stride + k;
            store(at, exp(_mm512_sub_ps(load(at), _mm512_set1_ps(most[r]))));
        }
    for (size_t d = 0; d < dim;) {
        if (dim - d >= 64) {
            mix_rows<E, 4>(s, values + d, dim, begin, end, p, p_stride, out, rows, 0xffff);
            d += 64;
            for (size_t r = 0; r < rows; r++) out[r] += 64;
        } else {
            __mmask16 tail = lanes(dim - d);
            mix_rows<E, 1>(s, values + d, dim, begin, end, p, p_stride, out, rows, tail);
            d += 16;
            for (size_t r = 0; r < rows; r++) out[r] += 16;
        }
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
