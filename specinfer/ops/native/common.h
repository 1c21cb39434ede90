// Vectors of 16 floats, read from and written to float32 or bfloat16, and a team of threads.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include <cstdlib>
#include <new>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

struct bfloat16 {
    uint16_t bits;
};

// One of the threads that run the same function at the same time.
struct Member {
    int index, size;

    // Its share of so many items: from begin(n) to end(n).
    size_t begin(size_t n) const { return n * index / size; }
    size_t end(size_t n) const { return n * (index + 1) / size; }
};

// Memory that grows and is kept, aligned to a cache line, of the thread that declares it.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    template <class T> T *get(size_t count) {
        size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
        if (bytes > size_) {
            std::free(memory_);
            size_ = bytes + bytes / 2;
            size_ -= size_ % 64;
            memory_ = std::aligned_alloc(64, size_);
            if (memory_ == nullptr) std::abort();
        }
        return static_cast<T *>(memory_);
    }

  private:
    void *memory_ = nullptr;
    size_t size_ = 0;
};

// Bytes from row to row of what several rows are read from at once: whole lines, an odd number, so
// that rows do not meet in the same few places of a cache (a third of the time for 8 rows of 12 KB).
inline size_t spread(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// The lanes of a vector that are left of `count` elements.
INLINE __mmask16 lanes(ptrdiff_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

INLINE __m512 load(const float *from, __mmask16 mask = 0xffff) {
    return _mm512_maskz_loadu_ps(mask, from);
}

INLINE __m512 load(const bfloat16 *from, __mmask16 mask = 0xffff) {
    __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE void store(float *to, __m512 value, __mmask16 mask = 0xffff) {
    _mm512_mask_storeu_ps(to, mask, value);
}

INLINE void store(bfloat16 *to, __m512 value, __mmask16 mask = 0xffff) {
#ifdef __AVX512BF16__
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
#else
    (void)to, (void)value, (void)mask;
    std::abort();
#endif
}

// e^x to one or two units in the last place; 0 below -104, infinity above 89.
INLINE __m512 exp(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(150.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f); // Cephes' expf
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}
