// Products of pairs of bf16, which follow each other along what is summed, with sums in float32.
#pragma once

#include "strips.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

using V = __m512;
using I = __m512i;

constexpr int kPairRows = 6;  // rows that one kernel call computes

// A matrix of pairs of numbers: rows by `row`, pairs by `step`, in pairs.
struct Pairs {
    using Right = uint32_t;
    using Wide = I;
    static constexpr int kHeld = kPairRows;

    const uint32_t *at;
    int64_t row, step;

    INLINE I one(int64_t m, int64_t k) const {
        uint32_t pair;
        memcpy(&pair, at + m * row + k * step, 4);
        return _mm512_set1_epi32(static_cast<int>(pair));
    }
    INLINE static I many(const uint32_t *b) { return _mm512_loadu_si512(b); }
    INLINE static V add(V sum, I one, I many) { return _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)many); }
};

// c[rows, columns] (+)= a b; columns are a multiple of 16.
void multiply(int64_t rows, int64_t columns, Pairs a, const uint32_t *b, int64_t b_step, int64_t steps,
              float *c, int64_t c_row, bool fresh) {
    strips(rows, columns, a, b, b_step, steps, c, c_row, fresh);
}

INLINE I word(const uint16_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

INLINE V wide_of(const uint16_t *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(word(from), 16)); }

INLINE void narrow(uint16_t *to, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(v));
}

// Two rows of numbers in one of pairs.
INLINE I paired(V first, V second) {
    const I low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const I high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows 0..held two by two, to[held / 2 rounded up, wide]; zeros past the last one.
void pair_rows(const uint16_t *from, int64_t row, int64_t held, int64_t wide, uint32_t *to) {
    for (int64_t i = 0; i < held; i += 2)
        for (int64_t d = 0; d < wide; d += width) {
            const uint16_t *first = from + i * row + d;
            const I second = i + 1 < held ? word(first + row) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i / 2 * wide + d, _mm512_or_si512(word(first), _mm512_slli_epi32(second, 16)));
        }
}

}  // namespace
}  // namespace pennyweight

#endif
