// The narrow products of adapters: rows times A or B, and the gradients of both.
#pragma once

#include "tiles.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

constexpr int64_t kInputs = 512;    // of a factor, whose bf16 numbers stand in the first-level cache
constexpr int64_t kNarrowed = 120;  // the most rows that one piece of work narrows
constexpr int64_t kSummed = 128;    // rows whose pairs stand in the first-level cache

// out[rows, rank] = scaling * x[rows, inputs] times a float32 factor: [rank, inputs], as A is, or
// [inputs, rank], as B is.
struct Narrowing {
    const uint16_t *x;
    int64_t inputs;
    const float *factor;
    int64_t rank;
    float scaling;
    bool by_inputs;  // the factor is [inputs, rank]
    uint16_t *out;
};

// sums[rows, 16] += x . factor along the inputs, for four of 16 ranks; the factor is bf16.
template <int rows>
INLINE void along(const uint16_t *x, int64_t row, const uint16_t *factor, int64_t inputs, float *sums) {
    V sum[rows][4];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 4; ++n) sum[m][n] = Lanes::zero();
    for (int64_t k = 0; k < inputs; k += 32) {
        I of[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) of[n] = _mm512_load_si512(factor + n * kInputs + k);
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) {
            const I one = _mm512_loadu_si512(x + m * row + k);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n)
                sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)one, (__m512bh)of[n]);
        }
    }
    for (int m = 0; m < rows; ++m) {
        float four[4];
        Lanes::sums(four, sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
        for (int n = 0; n < 4; ++n) sums[m * 16 + n] += four[n];
    }
}

// Rows first..first+held, 16 ranks from `j` on, inputs k..k+deep, with A.
void narrow_along(const Narrowing &n, int64_t first, int64_t held, int64_t j, int64_t k, int64_t deep,
                  float *sums) {
    alignas(64) uint16_t factor[16 * kInputs];
    const int64_t ranks = least(16, n.rank - j), whole = (ranks + 3) / 4 * 4;
    for (int64_t i = 0; i < whole; ++i)
        for (int64_t at = 0; at < deep; at += 32) {
            const float *from = n.factor + (j + i) * n.inputs + k + at;
            I both = _mm512_setzero_si512();
            if (i < ranks) both = (I)_mm512_cvtne2ps_pbh(Lanes::load(from + 16), Lanes::load(from));
            _mm512_store_si512(factor + i * kInputs + at, both);
        }
    for (int64_t m = 0; m < held; m += 4)
        for (int64_t i = 0; i < whole; i += 4) {
            const uint16_t *x = n.x + (first + m) * n.inputs + k, *of = factor + i * kInputs;
            float *to = sums + m * 16 + i;
            switch (least(4, held - m)) {
                case 4: along<4>(x, n.inputs, of, deep, to); break;
                case 3: along<3>(x, n.inputs, of, deep, to); break;
                case 2: along<2>(x, n.inputs, of, deep, to); break;
                default: along<1>(x, n.inputs, of, deep, to);
            }
        }
}

// The same with B.
void narrow_across(const Narrowing &n, int64_t first, int64_t held, int64_t j, int64_t k, int64_t deep,
                   float *sums) {
    alignas(64) I tile[kInputs / 2];
    fill_factor_columns(n.factor + k * n.rank + j, n.rank, least(16, n.rank - j), deep, n.scaling, tile, 1);
    const auto *x = reinterpret_cast<const uint32_t *>(n.x + first * n.inputs + k);
    multiply(held, 16, {x, n.inputs / 2, 1}, reinterpret_cast<const uint32_t *>(tile), 16, deep / 2, sums, 16,
             false);
}

// Rows first..first+held, at most kNarrowed of them.
void narrow(const Narrowing &n, int64_t first, int64_t held) {
    alignas(64) float sums[kNarrowed * 16];
    for (int64_t j = 0; j < n.rank; j += 16) {
        memset(sums, 0, static_cast<size_t>(held) * 16 * sizeof(float));
        for (int64_t k = 0; k < n.inputs; k += kInputs)
            (n.by_inputs ? narrow_across : narrow_along)(n, first, held, j, k, least(kInputs, n.inputs - k),
                                                         sums);
        for (int64_t m = 0; m < held; ++m)
            _mm256_mask_storeu_epi16(n.out + (first + m) * n.rank + j, lanes(n.rank - j),
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + m * 16)));
    }
}

// The gradient of a factor: scaling times the sum over rows of narrow[row, j] * wide[row, n], at
// out[j, n], as A lies, or at out[n, j], as B does.
struct Outer {
    const uint16_t *narrow, *wide;
    int64_t rank, columns;
    float *out;
    bool by_columns;  // out[n, j]
    float scaling;

    int64_t strips() const { return (columns + kOutputs - 1) / kOutputs; }
};

// Rows of `rank` numbers two by two; zeros beside an odd last one.
INLINE void pair_narrow(const uint16_t *from, int64_t rows, int64_t rank, uint32_t *to) {
    for (int64_t m = 0; m < rows; m += 2)
        for (int64_t j = 0; j < rank; j += 16) {
            const __mmask16 here = lanes(rank - j);
            const uint16_t *one = from + m * rank + j;
            const I first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, one));
            I second = _mm512_setzero_si512();
            if (m + 1 < rows) second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, one + rank));
            _mm512_mask_storeu_epi32(to + m / 2 * rank + j, here,
                                     _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
}

void gradient(const Outer &of, int64_t rows, int64_t strip) {
    alignas(64) uint32_t tile[kSummed / 2 * kOutputs], pairs[kSummed / 2 * kMostRank];
    alignas(64) float sums[(kMostRank + 15) * kOutputs];
    const int64_t first = strip * kOutputs, held = least(kOutputs, of.columns - first);
    for (int64_t m = 0; m < rows; m += kSummed) {
        const int64_t here = least(kSummed, rows - m);
        pair_rows(of.wide + m * of.columns + first, of.columns, here, held, tile);
        pair_narrow(of.narrow + m * of.rank, here, of.rank, pairs);
        multiply(of.rank, held, {pairs, 1, of.rank}, tile, held, (here + 1) / 2, sums, kOutputs, m == 0);
    }
    const V by = _mm512_set1_ps(of.scaling);
    for (int64_t n = 0; n < held; n += 16)
        for (int64_t j = 0; j < of.rank; j += 16) {
            I v[16];
            for (int64_t i = 0; i < 16; ++i)
                v[i] = j + i < of.rank ? (I)(_mm512_load_ps(sums + (j + i) * kOutputs + n) * by)
                                       : _mm512_setzero_si512();
            if (of.by_columns) turn(v);
            for (int64_t i = 0; i < 16; ++i) {
                if (of.by_columns)
                    _mm512_mask_storeu_epi32(of.out + (first + n + i) * of.rank + j, lanes(of.rank - j), v[i]);
                else if (j + i < of.rank)
                    _mm512_storeu_si512(of.out + (j + i) * of.columns + first + n, v[i]);
            }
        }
}

}  // namespace
}  // namespace pennyweight

#endif
