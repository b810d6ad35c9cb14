// Tiles of a weight in 4 bits or in bf16, and of an adapter's float32 factors, as products of pairs of bf16
// read them: 64 outputs in four vectors, each lane holding two inputs that follow each other.
#pragma once

#include "pairs.h"
#include "weight.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

constexpr int64_t kOutputs = 64;          // of a tile, in four vectors of 16
constexpr int64_t kMostRank = 256;        // of an adapter

// The 16 values of a block's codes in bf16.
INLINE __m256i table(const Weight &w, V levels, int64_t at) {
    return (__m256i)_mm512_cvtneps_pbh(levels * _mm512_set1_ps(block_scale(w, at >> w.block_shift)));
}

// 16 vectors of 16 whole numbers, turned.
INLINE void turn(I *v) {
    I t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// A weight that is no stored one but bf16 itself has neither levels nor scales.
INLINE const uint16_t *dense(const Weight &w) {
    return w.levels || w.scales ? nullptr : static_cast<const uint16_t *>(w.codes);
}

// Outputs first..first+held are rows of the weight, inputs its columns k..k+depth.
void fill_dense_rows(const Weight &w, int64_t first, int64_t held, int64_t k, int64_t depth, I *tile) {
    for (int64_t n = 0; n < held; n += 16)
        for (int64_t j = 0; j < depth; j += 32) {
            I v[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i)
                v[i] = _mm512_loadu_si512(dense(w) + (first + n + i) * w.columns + k + j);
            turn(v);
            I *to = tile + j / 2 * (kOutputs / 16) + n / 16;
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * (kOutputs / 16), v[i]);
        }
}

void fill_rows(const Weight &w, int64_t first, int64_t held, int64_t k, int64_t depth, I *tile) {
    const V levels = _mm512_loadu_ps(w.levels);
    const int64_t block = int64_t{1} << w.block_shift;
    const bool alike = w.columns % block == 0;  // blocks of all rows begin at the same columns
    for (int64_t n = 0; n < held; n += 16) {
        I tables[16];
        for (int64_t j = 0; j < depth; j += 32) {
            if (j == 0 || !alike || (k + j) % block == 0)
                for (int64_t i = 0; i < 16; ++i)
                    tables[i] = _mm512_broadcast_i64x4(
                        table(w, levels, (first + n + i) * w.columns + k + j));
            I v[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) {
                const int64_t at = (first + n + i) * w.columns + k + j;
                const auto *codes = static_cast<const uint8_t *>(w.codes) + at / 2;
                const I bytes = _mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
                // Of each index only the low four bits count: the table stands there twice.
                const I both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
                v[i] = _mm512_permutexvar_epi16(both, tables[i]);
            }
            turn(v);
            I *to = tile + j / 2 * (kOutputs / 16) + n / 16;
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * (kOutputs / 16), v[i]);
        }
    }
}

// Outputs first..first+held are columns of the weight, inputs its rows n..n+depth.
void fill_dense_columns(const Weight &w, int64_t first, int64_t held, int64_t n, int64_t depth, I *tile) {
    for (int64_t i = 0; i < depth; i += 2)
        pair_rows(dense(w) + (n + i) * w.columns + first, w.columns, 2, held,
                  reinterpret_cast<uint32_t *>(tile + i / 2 * (kOutputs / 16)));
}

void fill_columns(const Weight &w, int64_t first, int64_t held, int64_t n, int64_t depth, I *tile) {
    const V levels = _mm512_loadu_ps(w.levels);
    const int64_t block = int64_t{1} << w.block_shift;
    const I code = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
    for (int64_t i = 0; i < depth; i += 2) {
        const int64_t one = (n + i) * w.columns + first, two = one + w.columns;
        I values = _mm512_setzero_si512();
        for (int64_t j = 0; j < held; j += 16) {
            if (j == 0 || (one + j) % block == 0 || (two + j) % block == 0)
                values = _mm512_inserti64x4(_mm512_castsi256_si512(table(w, levels, one + j)),
                                            table(w, levels, two + j), 1);
            const auto *codes = static_cast<const uint8_t *>(w.codes);
            int64_t low, high;
            memcpy(&low, codes + (one + j) / 2, 8);
            memcpy(&high, codes + (two + j) / 2, 8);
            const I both = _mm512_or_si512(
                _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(low)),
                _mm512_slli_epi64(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(high)), 16));
            const I apart = _mm512_or_si512(_mm512_srli_epi64(both, 4), _mm512_slli_epi64(both, 32));
            const I index = _mm512_or_si512(_mm512_and_si512(apart, code), second);
            _mm512_store_si512(tile + i / 2 * (kOutputs / 16) + j / 16,
                               _mm512_permutexvar_epi16(index, values));
        }
    }
}

// The first `held` lanes of 16.
INLINE __mmask16 lanes(int64_t held) { return static_cast<__mmask16>(held >= 16 ? 0xffff : (1 << held) - 1); }

// A factor [outputs, inputs] in float32, times `scaling`, as a tile; zeros past the last output.
void fill_factor_rows(const float *factor, int64_t row, int64_t outputs, int64_t inputs, float scaling,
                      I *tile) {
    const V by = _mm512_set1_ps(scaling);
    for (int64_t n = 0; n < outputs; n += 16)
        for (int64_t j = 0; j < inputs; j += 16) {
            I v[16];
            for (int64_t i = 0; i < 16; ++i)
                v[i] = n + i < outputs
                           ? _mm512_maskz_loadu_epi32(lanes(inputs - j), factor + (n + i) * row + j)
                           : _mm512_setzero_si512();
            turn(v);
            for (int64_t i = 0; i < least(16, inputs - j); i += 2)
                _mm512_store_si512(tile + (j + i) / 2 * (kOutputs / 16) + n / 16,
                                   paired((V)v[i] * by, (V)v[i + 1] * by));
        }
}

// A factor [inputs, outputs] in the same way, its rows of pairs `step` vectors apart.
void fill_factor_columns(const float *factor, int64_t row, int64_t outputs, int64_t inputs, float scaling,
                         I *tile, int64_t step) {
    const V by = _mm512_set1_ps(scaling);
    for (int64_t j = 0; j < inputs; j += 2)
        for (int64_t n = 0; n < outputs; n += 16) {
            const float *one = factor + j * row + n;
            const __mmask16 here = lanes(outputs - n);
            _mm512_store_si512(tile + j / 2 * step + n / 16, paired(_mm512_maskz_loadu_ps(here, one) * by,
                                                                    _mm512_maskz_loadu_ps(here, one + row) * by));
        }
}

}  // namespace
}  // namespace pennyweight

#endif
