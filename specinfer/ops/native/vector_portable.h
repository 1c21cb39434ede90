// Vectors of 4 lanes as GCC and clang have them for any processor. What each function does stands
// in vector_avx512.h.
#pragma once

#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Words __attribute__((vector_size(16)));
typedef uint32_t UnsignedWords __attribute__((vector_size(16)));
using Lanes = int; // how many

constexpr int LANES = 4;
#ifdef __ARM_NEON
constexpr int MAX_SUMS = 24; // of 32 registers
#else
constexpr int MAX_SUMS = 8; // of 16
#endif
constexpr Lanes ALL = 4;

INLINE Lanes lanes(ptrdiff_t count) { return count >= 4 ? 4 : count <= 0 ? 0 : (int)count; }

// --- words ---------------------------------------------------------------------------------------

INLINE Words hold(Words a) { return a; }
INLINE Words broadcast(int32_t word) { return Words{word, word, word, word}; }
INLINE Words add(Words a, Words b) { return a + b; }
INLINE Words subtract(Words a, Words b) { return a - b; }
INLINE Words bits_of(Words a, uint32_t bits) { return a & broadcast(bits); }
INLINE Words shift_left(Words a, int bits) { return a << bits; }
INLINE Words shift_right(Words a, int bits) { return (Words)((UnsignedWords)a >> bits); }
INLINE Vector as_floats(Words a) { return (Vector)a; }
INLINE Words as_words(Vector a) { return (Words)a; }
INLINE Vector to_floats(Words a) { return __builtin_convertvector(a, Vector); }
// Both halves stay words, of which the products of 16 bits are made.
INLINE Words even_bytes(Words a) { return ((a << 24) >> 24 & 0xffff) | ((a << 8) >> 24 << 16); }
INLINE Words odd_bytes(Words a) { return ((a << 16) >> 24 & 0xffff) | (a >> 24 << 16); }
INLINE Words dot_shorts(Words a, Words b) {
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

// --- floats --------------------------------------------------------------------------------------

INLINE Vector splat(float value) { return Vector{value, value, value, value}; }
INLINE Vector fma(Vector a, Vector b, Vector c) {
#ifdef __ARM_NEON
    return vfmaq_f32(c, a, b);
#else
    return a * b + c; // rounded twice, always
#endif
}
INLINE Vector select(Words where, Vector a, Vector b) {
    return (Vector)((where & (Words)a) | (~where & (Words)b));
}
INLINE Vector max(Vector a, Vector b) { return select(a > b, a, b); }
INLINE Vector min(Vector a, Vector b) { return select(a < b, a, b); }
INLINE Vector absolute(Vector x) { return (Vector)((Words)x & 0x7fffffff); }
// Of what is below 2^22: a float of 2^23 has no fraction left.
INLINE Vector nearest(Vector x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
INLINE Words to_words(Vector a) { return __builtin_convertvector(nearest(a), Words); }
INLINE Vector scale_by_power(Vector x, Vector n) {
    // 2^n may be no float where the result is one.
    Words whole = to_words(n), half = whole >> 1;
    return x * (Vector)((half + 127) << 23) * (Vector)((whole - half + 127) << 23);
}
INLINE float highest(Vector x) {
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
INLINE float total(Vector x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE uint32_t find_nans(Vector x) {
    Words nan = x != x;
    return (nan[0] | nan[1] | nan[2] | nan[3]) & 1;
}
INLINE Vector hide(Vector x, uint32_t seen) {
    Words lane = {1, 2, 4, 8};
    return select((broadcast(seen) & lane) == lane, x, splat(-INFINITY));
}

// --- memory --------------------------------------------------------------------------------------

INLINE Words load_words(const void *from, Lanes of = ALL) {
    Words value = {};
    memcpy(&value, from, of * sizeof(int32_t));
    return value;
}
INLINE Words load_line(const void *from) { return load_words(from); }
INLINE void store_line(void *to, Words value) { memcpy(to, &value, sizeof(value)); }

INLINE Vector load(const float *from, Lanes of = ALL) { return (Vector)load_words(from, of); }
INLINE Vector load(const bfloat16 *from, Lanes of = ALL) {
    uint16_t bits[4] = {};
    memcpy(bits, from, of * sizeof(bfloat16));
    return (Vector)(Words{bits[0], bits[1], bits[2], bits[3]} << 16);
}

INLINE void store_shorts(void *to, Words value, Lanes of = ALL) {
    uint16_t shorts[4] = {(uint16_t)value[0], (uint16_t)value[1], (uint16_t)value[2],
                          (uint16_t)value[3]};
    memcpy(to, shorts, of * sizeof(uint16_t));
}
INLINE void store_crossed(void *to, Words value) {
    store_shorts(to, Words{value[0], value[2], value[1], value[3]});
}

INLINE void store(float *to, Vector value, Lanes of = ALL) {
    memcpy(to, &value, of * sizeof(float));
}
INLINE void store(bfloat16 *to, Vector value, Lanes of = ALL) {
    Words x = (Words)value, one = shift_right(x, 16) & 1;
    Words bits = shift_right(x + one + 0x7fff, 16);
    store_shorts(to, (Words)select(value != value, (Vector)broadcast(0x7fc0), (Vector)bits), of);
}

INLINE void transpose(Words (&r)[4]) {
    Words t[4] = {r[0], r[1], r[2], r[3]};
    UNROLL for (int i = 0; i < 4; i++) r[i] = Words{t[0][i], t[1][i], t[2][i], t[3][i]};
}
