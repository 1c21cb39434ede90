// Vectors of 8 lanes: AVX2 with FMA. What each function does stands in vector_avx512.h.
#pragma once

#include <immintrin.h>

using Vector = __m256;
using Words = __m256i;
using Lanes = int; // how many

constexpr int LANES = 8;
constexpr int MAX_SUMS = 8; // of 16 registers
constexpr Lanes ALL = 8;

#ifdef __AVXVNNI__
#define HAS_BYTES
#endif

INLINE Lanes lanes(ptrdiff_t count) { return count >= 8 ? 8 : count <= 0 ? 0 : (int)count; }

INLINE __m256i mask_of(Lanes of) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(of), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// --- floats --------------------------------------------------------------------------------------

INLINE Vector splat(float value) { return _mm256_set1_ps(value); }
INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
INLINE Vector min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
INLINE Vector absolute(Vector x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE Vector nearest(Vector x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vector scale_by_power(Vector x, Vector n) {
    // 2^n may be no float where the result is one.
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    __m256i rest = _mm256_sub_epi32(whole, half), one = _mm256_set1_epi32(127);
    x = x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
}
INLINE float highest(Vector x) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps(v, v, 1)));
}
INLINE float total(Vector x) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
INLINE uint32_t find_nans(Vector x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
INLINE Vector hide(Vector x, uint32_t seen) {
    __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(seen), lane), lane);
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(mask));
}

// --- words ---------------------------------------------------------------------------------------

INLINE Words hold(Words a) {
    asm("" : "+x"(a));
    return a;
}
INLINE Words broadcast(int32_t word) { return _mm256_set1_epi32(word); }
INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
INLINE Words subtract(Words a, Words b) { return _mm256_sub_epi32(a, b); }
INLINE Words bits_of(Words a, uint32_t bits) { return _mm256_and_si256(a, broadcast(bits)); }
INLINE Words shift_left(Words a, int bits) { return _mm256_slli_epi32(a, bits); }
INLINE Words shift_right(Words a, int bits) { return _mm256_srli_epi32(a, bits); }
INLINE Vector as_floats(Words a) { return _mm256_castsi256_ps(a); }
INLINE Words as_words(Vector a) { return _mm256_castps_si256(a); }
INLINE Vector to_floats(Words a) { return _mm256_cvtepi32_ps(a); }
INLINE Words to_words(Vector a) { return _mm256_cvtps_epi32(a); }
INLINE Words even_bytes(Words a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
INLINE Words odd_bytes(Words a) { return _mm256_srai_epi16(a, 8); }
INLINE Words dot_shorts(Words a, Words b) { return _mm256_madd_epi16(a, b); }
#ifdef HAS_BYTES
INLINE Words dot_bytes(Words sum, Words a, Words b) { return _mm256_dpbusd_avx_epi32(sum, b, a); }
#endif

// --- memory --------------------------------------------------------------------------------------

INLINE Words load_line(const void *from) { return _mm256_load_si256((const __m256i *)from); }
INLINE void store_line(void *to, Words value) { _mm256_store_si256((__m256i *)to, value); }
INLINE Words load_words(const void *from, Lanes of = ALL) {
    if (of == ALL) return _mm256_loadu_si256((const __m256i *)from);
    return _mm256_maskload_epi32((const int *)from, mask_of(of));
}

INLINE Vector load(const float *from, Lanes of = ALL) { return as_floats(load_words(from, of)); }
INLINE Vector load(const bfloat16 *from, Lanes of = ALL) {
    uint16_t part[8] = {};
    if (of != ALL) from = (const bfloat16 *)memcpy(part, from, of * sizeof(bfloat16));
    __m128i bits = _mm_loadu_si128((const __m128i *)from);
    return as_floats(shift_left(_mm256_cvtepu16_epi32(bits), 16));
}

INLINE void store_shorts(void *to, Words value, Lanes of = ALL) {
    __m256i packed = _mm256_packus_epi32(bits_of(value, 0xffff), _mm256_setzero_si256());
    __m128i shorts = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    if (of == ALL) return _mm_storeu_si128((__m128i *)to, shorts);
    memcpy(to, &shorts, of * sizeof(uint16_t));
}
INLINE void store_bytes(void *to, Words value) {
    __m256i shorts = _mm256_packus_epi32(bits_of(value, 0xff), _mm256_setzero_si256());
    __m256i bytes = _mm256_packus_epi16(shorts, shorts);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64((__m128i *)to, _mm256_castsi256_si128(bytes));
}
INLINE void store_crossed(void *to, Words value) {
    store_shorts(to, _mm256_shuffle_epi32(value, _MM_SHUFFLE(3, 1, 2, 0)));
}

INLINE void store(float *to, Vector value, Lanes of = ALL) {
    if (of == ALL) return _mm256_storeu_ps(to, value);
    _mm256_maskstore_ps(to, mask_of(of), value);
}
INLINE void store(bfloat16 *to, Vector value, Lanes of = ALL) {
    Words x = as_words(value), one = bits_of(shift_right(x, 16), 1);
    Words bits = shift_right(add(x, add(one, broadcast(0x7fff))), 16);
    __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    bits = _mm256_blendv_epi8(bits, broadcast(0x7fc0), _mm256_castps_si256(nan));
    store_shorts(to, bits, of);
}

INLINE void transpose(Words (&r)[8]) {
    Words t[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}
