// What all kernels share: threads as a team, memory that is kept, and vectors of `LANES` floats.
//
// A form is what a processor has: `vector_*.h` hold the same types and functions for each, and all
// else is written once over them. What they define beside those:
//
//     HAS_PAIRS   `dot_pairs`: products of bfloat16 two by two, and `look_up` for int4
//     HAS_BYTES   `dot_bytes`: products of bytes four by four
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cstdlib>
#include <new>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

// What has been read from memory is read again: registers are few, a first-level cache is quick.
#define FORGET asm volatile("" ::: "memory")

struct bfloat16 {
    uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vector_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vector_avx2.h"
#else
#include "vector_portable.h"
#endif

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

// Of each word the same bits, read from memory where they are used: they hold no register.
INLINE Words bits_of(Words a, const uint32_t *bits) {
    asm("" : "+r"(bits));
    return bits_of(a, *bits);
}

// e^x to one or two units in the last place; 0 below -104, infinity above 89.
INLINE Vector exp(Vector x) {
    x = max(splat(-150.0f), x);
    x = min(splat(150.0f), x);
    Vector n = nearest(x * splat(1.44269504f));
    Vector r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Vector y = splat(1.9875691500e-4f); // Cephes' expf
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, r * r, r + splat(1.0f));
    return scale_by_power(y, n);
}
