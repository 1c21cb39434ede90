// Vectors of 16 lanes: AVX-512.
#pragma once

#include <immintrin.h>

using Vector = __m512;   // floats; the compiler knows + - * /
using Words = __m512i;   // 32 bits each, of whatever
using Lanes = __mmask16; // the first so many of a vector

constexpr int LANES = 16;
constexpr int MAX_SUMS = 24; // vectors of sums in registers at once, of 32
constexpr Lanes ALL = 0xffff;

#ifdef __AVX512BF16__
#define HAS_PAIRS
#endif
#ifdef __AVX512VNNI__
#define HAS_BYTES
#endif

// The lanes of a vector that are left of `count` elements.
INLINE Lanes lanes(ptrdiff_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// --- floats --------------------------------------------------------------------------------------

INLINE Vector splat(float value) { return _mm512_set1_ps(value); }
INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// b where either is NaN.
INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
INLINE Vector min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
INLINE Vector absolute(Vector x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
INLINE Vector nearest(Vector x) { return _mm512_roundscale_ps(x, 0); }
// x * 2^n of whole n, of which half must be an exponent.
INLINE Vector scale_by_power(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }
INLINE float highest(Vector x) { return _mm512_reduce_max_ps(x); }
INLINE float total(Vector x) { return _mm512_reduce_add_ps(x); }
INLINE uint32_t find_nans(Vector x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
// -infinity where `seen` has no bit.
INLINE Vector hide(Vector x, uint32_t seen) {
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
}

// --- words ---------------------------------------------------------------------------------------

// In a register from here on: the compiler would read it from memory at each use.
INLINE Words hold(Words a) {
    asm("" : "+v"(a));
    return a;
}
INLINE Words broadcast(int32_t word) { return _mm512_set1_epi32(word); }
INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
INLINE Words subtract(Words a, Words b) { return _mm512_sub_epi32(a, b); }
INLINE Words bits_of(Words a, uint32_t bits) { return _mm512_and_si512(a, broadcast(bits)); }
INLINE Words shift_left(Words a, int bits) { return _mm512_slli_epi32(a, bits); }
INLINE Words shift_right(Words a, int bits) { return _mm512_srli_epi32(a, bits); }
INLINE Vector as_floats(Words a) { return _mm512_castsi512_ps(a); }
INLINE Words as_words(Vector a) { return _mm512_castps_si512(a); }
INLINE Vector to_floats(Words a) { return _mm512_cvtepi32_ps(a); }
INLINE Words to_words(Vector a) { return _mm512_cvtps_epi32(a); } // to the nearest

// Of each word's four signed bytes the even or the odd two, as 16 bits.
INLINE Words even_bytes(Words a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
INLINE Words odd_bytes(Words a) { return _mm512_srai_epi16(a, 8); }
// Two products of 16 bits each, and their sum.
INLINE Words dot_shorts(Words a, Words b) { return _mm512_madd_epi16(a, b); }

#ifdef HAS_PAIRS
INLINE Vector dot_pairs(Vector sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a);
}
#endif

#ifdef HAS_BYTES
// a signed, b not. By its name, as GCC 12 copies the sums around the intrinsic: half as fast.
INLINE Words dot_bytes(Words sum, Words a, Words b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
}
#endif

// --- memory --------------------------------------------------------------------------------------

INLINE Words load_line(const void *from) { return _mm512_load_si512(from); } // aligned
INLINE void store_line(void *to, Words value) { _mm512_store_si512(to, value); }
INLINE Words load_words(const void *from, Lanes of = ALL) {
    return _mm512_maskz_loadu_epi32(of, from);
}

INLINE Vector load(const float *from, Lanes of = ALL) { return _mm512_maskz_loadu_ps(of, from); }
INLINE Vector load(const bfloat16 *from, Lanes of = ALL) {
    __m256i bits = _mm256_maskz_loadu_epi16(of, from);
    return as_floats(shift_left(_mm512_cvtepu16_epi32(bits), 16));
}

// The low 16 or 8 bits of each word.
INLINE void store_shorts(void *to, Words value, Lanes of = ALL) {
    _mm256_mask_storeu_epi16(to, of, _mm512_cvtepi32_epi16(value));
}
INLINE void store_bytes(void *to, Words value) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(value));
}
// The same of 16 bits, of each four words the inner two exchanged.
INLINE void store_crossed(void *to, Words value) {
    store_shorts(to, _mm512_shuffle_epi32(value, _MM_PERM_DBCA));
}

INLINE void store(float *to, Vector value, Lanes of = ALL) {
    _mm512_mask_storeu_ps(to, of, value);
}
INLINE void store(bfloat16 *to, Vector value, Lanes of = ALL) {
#ifdef HAS_PAIRS
    _mm256_mask_storeu_epi16(to, of, (__m256i)_mm512_cvtneps_pbh(value));
#else
    Words x = as_words(value), one = bits_of(shift_right(x, 16), 1);
    Words bits = shift_right(add(x, add(one, broadcast(0x7fff))), 16); // to nearest, ties to even
    store_shorts(to, _mm512_mask_blend_epi32(find_nans(value), bits, broadcast(0x7fc0)), of);
#endif
}

// --- what only some processors can ---------------------------------------------------------------

#ifdef HAS_PAIRS
// -8 ... 7 in bfloat16, twice: a look-up reads five bits, of which the fifth is the next nibble's.
alignas(64) static const uint16_t NIBBLE[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};

// The lowest nibble of each 16 bits, less 8, as bfloat16.
INLINE Words look_up(Words nibbles) {
    return _mm512_permutexvar_epi16(nibbles, _mm512_load_si512(NIBBLE));
}
#endif

INLINE void transpose(Words (&r)[16]) {
    Words t[16];
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
