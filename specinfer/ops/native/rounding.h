// Weights rounded to int4, as `quantize_int4` of ops/quantized.py says it, bit for bit. The vectors
// are the compiler's own, so that any processor has them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common.h"

namespace rounding {

typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef int8_t Bytes16 __attribute__((vector_size(16)));

constexpr float DIVISORS[] = {8.0f, 7.5f, 7.0f, 8.5f, 9.0f, 9.75f, 10.5f};
constexpr float SMALLEST_SCALE = 1e-30f;

INLINE Floats16 read16(const float *from) {
    Floats16 values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

INLINE Floats16 read16(const bfloat16 *from) {
    Halves16 bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Floats16)(__builtin_convertvector(bits, Words16) << 16);
}

// f of the two halves of a vector.
template <class Half, class V, class F> INLINE Half halve(const V &v, const F &f) {
    Half parts[2];
    static_assert(sizeof parts == sizeof v);
    std::memcpy(parts, &v, sizeof v);
    return f(parts[0], parts[1]);
}

// The same until one number is left.
template <class F> INLINE float fold(const Floats16 &v, const F &f) {
    Floats4 four = halve<Floats4>(halve<Floats8>(v, f), f);
    return f(f(four[0], four[2]), f(four[1], four[3]));
}

// To the nearest whole number, of two the even one; for values below 2^22.
INLINE Floats16 nearest(Floats16 v) {
    constexpr float big = 12582912.0f; // 1.5 * 2^23
    return (v + big) - big;
}

// The nearest float of 5 significant bits, of two the even one; never 0.
inline float few_bits(float scale) {
    constexpr int dropped = 19;
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof bits);
    bits += (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
    bits &= ~0u << dropped;
    std::memcpy(&scale, &bits, sizeof bits);
    return std::fabs(scale) < SMALLEST_SCALE ? SMALLEST_SCALE : scale;
}

// The weight of the largest size, of two the negative one; any, where one is NaN.
template <int N> INLINE float extreme(const Floats16 *w) {
    auto less = [](auto a, auto b) { return a < b ? a : b; };
    auto more = [](auto a, auto b) { return a > b ? a : b; };
    Floats16 low = w[0], high = w[0];
    for (int i = 1; i < N; i++) {
        low = less(w[i], low);
        high = more(w[i], high);
    }
    float least = fold(low, less), most = fold(high, more);
    return most > -least ? most : least;
}

// A group of 16 N weights -> values, and its scale: NaN where a squared error is never finite.
template <int N, class E> void round_group(const E *from, int8_t *to, float *to_scale) {
    Floats16 w[N], kept[N];
    UNROLL for (int i = 0; i < N; i++) {
        w[i] = read16(from + i * 16);
        kept[i] = Floats16{};
    }
    const float largest = extreme<N>(w);
    float best = std::numeric_limits<float>::infinity();
    float scale = std::numeric_limits<float>::quiet_NaN();
    for (float divisor : DIVISORS) {
        const float tried = few_bits(largest / -divisor);
        Floats16 rounded[N], error[N];
        UNROLL for (int i = 0; i < N; i++) {
            Floats16 v = nearest(w[i] / tried);
            v = v < -8.0f ? Floats16{} - 8.0f : v;
            v = v > 7.0f ? Floats16{} + 7.0f : v;
            Floats16 off = v * tried - w[i];
            rounded[i] = v;
            error[i] = off * off;
        }
        UNROLL for (int half = N / 2; half > 0; half /= 2)
            UNROLL for (int i = 0; i < half; i++) error[i] += error[i + half];
        const float total = fold(error[0], [](auto a, auto b) { return a + b; });
        if (total < best) {
            best = total;
            scale = tried;
            UNROLL for (int i = 0; i < N; i++) kept[i] = rounded[i];
        }
    }
    UNROLL for (int i = 0; i < N; i++) {
        Bytes16 values = __builtin_convertvector(kept[i], Bytes16);
        std::memcpy(to + i * 16, &values, sizeof values);
    }
    *to_scale = scale;
}

// from [groups][16 N] -> values alike, scales [groups]
template <int N, class E>
void round_groups(const E *from, size_t groups, int8_t *values, float *scales, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t g = 0; g < groups; g++)
        round_group<N>(from + g * 16 * N, values + g * 16 * N, scales + g);
}

template <class E>
void round_groups(const E *from, size_t groups, size_t size, int8_t *values, float *scales,
                  int threads) {
    switch (size) {
    case 32: return round_groups<2>(from, groups, values, scales, threads);
    case 64: return round_groups<4>(from, groups, values, scales, threads);
    default: return round_groups<8>(from, groups, values, scales, threads);
    }
}

} // namespace rounding
