// Products of bf16 rows with a weight in 4 bits or in bf16, on processors that multiply pairs of bf16
// and sum them in float32. A 4-bit weight's values are rounded to bf16 as `dequantize` rounds them; an
// adapter's part is added in the same sum, which is rounded once.
//
// A tile of the weight stands in the second-level cache, 64 outputs in four vectors, each lane holding
// two inputs that follow each other; rows are read where they lie. What is computed for a row does not
// depend on how many rows stand beside it.

#include "pairs.h"
#include "threads.h"
#include "weight.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

constexpr int kRows = kPairRows;
constexpr int64_t kOutputs = 64;          // of a tile, in four vectors of 16
constexpr int64_t kDepth = 1536;          // inputs of a tile, 192 KB; more come after them
constexpr int64_t kMostRank = 256;        // of an adapter that is added in the same sum
constexpr int64_t kApart = 512;           // rows whose sums wait between two depths, 128 KB
constexpr int64_t kPart = 64;             // rows worth a piece of work of their own


// x[rows, rank] times a float32 factor, whose element for output n and input j is at
// n * output_step + j * input_step.
struct LowRank {
    const uint16_t *x;
    const float *factor;
    int64_t rank, output_step, input_step;
    float scaling;
};

struct Product {
    const Weight *weight;
    const uint16_t *x;
    int64_t rows, inputs, outputs;
    const float *bias;   // null: none
    const LowRank *low;  // null: none
    uint16_t *out;
    bool transposed;  // outputs are the weight's columns
    int64_t parts;    // of the rows
};

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

// A float32 factor of some outputs and inputs, its elements by strides, as a tile whose rows of pairs
// are `step` vectors apart; zeros past the last output.
void fill_factor(const float *factor, int64_t output_step, int64_t input_step, int64_t outputs,
                 int64_t inputs, float scaling, I *tile, int64_t step) {
    const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(output_step)));
    const V by = _mm512_set1_ps(scaling);
    for (int64_t n = 0; n < outputs; n += 16) {
        const auto here = static_cast<__mmask16>(outputs - n >= 16 ? 0xffff : (1 << (outputs - n)) - 1);
        for (int64_t j = 0; j < inputs; j += 2) {
            const float *one = factor + n * output_step + j * input_step, *two = one + input_step;
            V first, second;
            if (output_step == 1) {
                first = _mm512_maskz_loadu_ps(here, one), second = _mm512_maskz_loadu_ps(here, two);
            } else {
                first = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, apart, one, 4);
                second = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, apart, two, 4);
            }
            _mm512_storeu_si512(tile + j / 2 * step + n / 16, paired(first * by, second * by));
        }
    }
}

template <int rows, int vectors>
INLINE void add(V (*sum)[vectors], const uint16_t *x, int64_t stride, const I *tile, int64_t steps) {
    for (int64_t k = 0; k < steps; ++k, x += 2, tile += kOutputs / 16) {
        I wide[vectors];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) wide[n] = _mm512_load_si512(tile + n);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            int32_t both;
            memcpy(&both, x + m * stride, 4);
            const I one = _mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n)
                sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)one, (__m512bh)wide[n]);
        }
    }
}

// Where the sums of some rows begin and go: `apart` holds them between depths.
struct Rows {
    const uint16_t *x;
    int64_t stride, steps;
    const uint16_t *low;  // null: nothing is added yet, or ever
    int64_t rank;
    const float *bias;
    float *apart;
    bool begun;
    uint16_t *out;  // null: sums stay apart
    int64_t out_stride;
};

template <int rows, int vectors>
void rows_of(const Rows &of, const I *tile, const I *low) {
    V sum[rows][vectors];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n)
            sum[m][n] = of.begun  ? _mm512_loadu_ps(of.apart + m * kOutputs + 16 * n)
                        : of.bias ? _mm512_loadu_ps(of.bias + 16 * n)
                                  : _mm512_setzero_ps();
    add<rows, vectors>(sum, of.x, of.stride, tile, of.steps);
    if (of.low) add<rows, vectors>(sum, of.low, of.rank, low, of.rank / 2);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n += 2) {
            if (of.out) {
                _mm512_storeu_si512(of.out + m * of.out_stride + 16 * n,
                                    (I)_mm512_cvtne2ps_pbh(sum[m][n + 1], sum[m][n]));
            } else {
                _mm512_storeu_ps(of.apart + m * kOutputs + 16 * n, sum[m][n]);
                _mm512_storeu_ps(of.apart + m * kOutputs + 16 * (n + 1), sum[m][n + 1]);
            }
        }
}

template <int vectors, int rows = kRows>
INLINE void any_rows(int64_t held, const Rows &of, const I *tile, const I *low) {
    if constexpr (rows == 1)
        rows_of<1, vectors>(of, tile, low);
    else if (held >= rows)
        rows_of<rows, vectors>(of, tile, low);
    else
        any_rows<vectors, rows - 1>(held, of, tile, low);
}

void multiply(void *given, int64_t piece) {
    const Product &p = *static_cast<const Product *>(given);
    alignas(64) I tile[kDepth / 2 * (kOutputs / 16)], low[kMostRank / 2 * (kOutputs / 16)];
    alignas(64) float apart[kApart * kOutputs];
    const int64_t first = piece / p.parts * kOutputs, held = least(kOutputs, p.outputs - first);
    const int64_t part = (p.rows + p.parts - 1) / p.parts;
    const int64_t start = piece % p.parts * part, stop = least(start + part, p.rows);
    const int64_t depths = (p.inputs + kDepth - 1) / kDepth;
    const int64_t depth = (p.inputs / 32 + depths - 1) / depths * 32;
    const auto fill = dense(*p.weight) ? (p.transposed ? fill_dense_columns : fill_dense_rows)
                                       : (p.transposed ? fill_columns : fill_rows);
    if (const LowRank *of = p.low)
        fill_factor(of->factor + first * of->output_step, of->output_step, of->input_step, held, of->rank,
                    of->scaling, low, kOutputs / 16);
    const int64_t at_once = depths == 1 ? p.rows : kApart;
    for (int64_t begin = start; begin < stop; begin += at_once)
        for (int64_t k = 0; k < p.inputs; k += depth) {
            const int64_t deep = least(depth, p.inputs - k), end = least(begin + at_once, stop);
            const bool last = k + deep == p.inputs;
            fill(*p.weight, first, held, k, deep, tile);
            for (int64_t m = begin; m < end; m += kRows) {
                const Rows of{
                    p.x + m * p.inputs + k,
                    p.inputs,
                    deep / 2,
                    p.low && last ? p.low->x + m * p.low->rank : nullptr,
                    p.low ? p.low->rank : 0,
                    p.bias ? p.bias + first : nullptr,
                    apart + (m - begin) * kOutputs * (depths > 1),
                    k > 0,
                    last ? p.out + m * p.outputs + first : nullptr,
                    p.outputs,
                };
                if (held == kOutputs)
                    any_rows<4>(end - m, of, tile, low);
                else
                    any_rows<2>(end - m, of, tile, low);
            }
        }
}

void multiply(Product p, int threads) {
    p.parts = 1;
    const int64_t strips = (p.outputs + kOutputs - 1) / kOutputs;
    while (strips * p.parts < 3 * threads && p.rows > 2 * p.parts * kPart) ++p.parts;
    share_out(strips * p.parts, threads, multiply, &p);
}

// out[rows, rank] = x times a factor [rank, inputs] by strides, which is made bf16 in `tile`.
struct Narrowing {
    const uint16_t *x;
    int64_t rows, inputs, rank;
    const float *factor;
    int64_t output_step, input_step;
    float scaling;
    I *tile;
    uint16_t *out;

    int64_t vectors() const { return (rank + 15) / 16; }
};

constexpr int64_t kInputs = 512, kNarrowed = 96;  // of a factor, and rows, in a piece of work

void fill_narrowing(void *given, int64_t piece) {
    const Narrowing &n = *static_cast<const Narrowing *>(given);
    const int64_t first = piece * kInputs;
    fill_factor(n.factor + first * n.input_step, n.output_step, n.input_step, n.rank,
                least(kInputs, n.inputs - first), n.scaling, n.tile + first / 2 * n.vectors(), n.vectors());
}

void narrow_rows(void *given, int64_t piece) {
    const Narrowing &n = *static_cast<const Narrowing *>(given);
    alignas(64) float sums[kNarrowed * kMostRank];
    const int64_t first = piece * kNarrowed, held = least(kNarrowed, n.rows - first), wide = 16 * n.vectors();
    const auto *x = reinterpret_cast<const uint32_t *>(n.x + first * n.inputs);
    multiply(held, wide, {x, n.inputs / 2, 1}, reinterpret_cast<const uint32_t *>(n.tile), wide, n.inputs / 2,
             sums, wide, true);
    for (int64_t m = 0; m < held; ++m)
        for (int64_t j = 0; j < n.rank; j += 16) {
            const auto here = static_cast<__mmask16>(n.rank - j >= 16 ? 0xffff : (1 << (n.rank - j)) - 1);
            _mm256_mask_storeu_epi16(n.out + (first + m) * n.rank + j, here,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + m * wide + j)));
        }
}

void narrow_all(Narrowing n, int threads) {
    share_out((n.inputs + kInputs - 1) / kInputs, threads, fill_narrowing, &n);
    share_out((n.rows + kNarrowed - 1) / kNarrowed, threads, narrow_rows, &n);
}

// Gradients of a factor: the sum over rows of narrow[row, j] * wide[row, n], at out[j, n] by strides.
struct Outer {
    const uint32_t *narrow;  // rows in pairs, [rows / 2 rounded up, rank]
    const uint16_t *wide;
    int64_t columns;
    float *out;
    int64_t narrow_step, wide_step;
    float scaling;
};

struct Gradients {
    Outer of[2];
    int64_t rows, rank;
};

constexpr int64_t kSummed = 128;  // rows whose pairs stand in the first-level cache

void gradients(void *given, int64_t piece) {
    const Gradients &g = *static_cast<const Gradients *>(given);
    alignas(64) uint32_t tile[kSummed / 2 * kOutputs];
    alignas(64) float sums[kMostRank * kOutputs];
    const int64_t strips = g.of[0].out ? (g.of[0].columns + kOutputs - 1) / kOutputs : 0;
    const Outer &of = g.of[piece >= strips];
    const int64_t first = (piece - (piece >= strips) * strips) * kOutputs;
    const int64_t held = least(kOutputs, of.columns - first);
    for (int64_t m = 0; m < g.rows; m += kSummed) {
        const int64_t rows = least(kSummed, g.rows - m);
        pair_rows(of.wide + m * of.columns + first, of.columns, rows, held, tile);
        multiply(g.rank, held, {of.narrow + m / 2 * g.rank, 1, g.rank}, tile, held, (rows + 1) / 2, sums,
                 kOutputs, m == 0);
    }
    for (int64_t j = 0; j < g.rank; ++j)
        for (int64_t n = 0; n < held; ++n)
            of.out[j * of.narrow_step + (first + n) * of.wide_step] = sums[j * kOutputs + n] * of.scaling;
}

// Rows of `rank` numbers in pairs; zeros beside an odd last one.
void pair_narrow(const uint16_t *from, int64_t rows, int64_t rank, uint32_t *to) {
    for (int64_t m = 0; m < rows; m += 2)
        for (int64_t j = 0; j < rank; ++j)
            to[m / 2 * rank + j] = from[m * rank + j] |
                                   (m + 1 < rows ? static_cast<uint32_t>(from[(m + 1) * rank + j]) << 16 : 0);
}

// An adapter beside the weight: float32 masters a[rank, columns] and b[rows, rank] of the weight.
struct Adapter {
    const float *a, *b;
    int64_t rank;
    float scaling;
};

INLINE int64_t tile_bytes(const Weight &w, int64_t rank) {
    const int64_t inputs = w.rows > w.columns ? w.rows : w.columns;
    return inputs / 2 * ((rank + 15) / 16) * static_cast<int64_t>(sizeof(I));
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

// out[rows, outputs] = x W^T + bias, or x W where `transposed`, with an adapter's part. Rows and
// columns of the weight are multiples of 32, its blocks too; it is held in 4 bits, or in bf16.
EXPORTED(void, multiply_bf16)(const Weight *weight, const uint16_t *x, int64_t rows, const float *bias,
                              const LowRank *low, bool transposed, uint16_t *out, int32_t threads) {
    Product p{weight, x, rows, weight->columns, weight->rows, bias, low, out, transposed, 1};
    if (transposed) p.inputs = weight->rows, p.outputs = weight->columns;
    multiply(p, threads);
}

// Bytes that the two below work in, at 64 bytes.
EXPORTED(int64_t, adapted_bytes)(const Weight *weight, int64_t rows, int64_t rank) {
    return tile_bytes(*weight, rank) + 2 * (rows + 1) / 2 * rank * static_cast<int64_t>(sizeof(uint32_t));
}

// z[rows, rank] = x A^T, and out[rows, weight rows] = x W^T + bias + scaling z B^T.
EXPORTED(void, adapted_bf16)(const Weight *weight, const uint16_t *x, int64_t rows, const float *bias,
                             const Adapter *adapter, uint16_t *z, uint16_t *out, void *space,
                             int32_t threads) {
    const Adapter &of = *adapter;
    auto *tile = static_cast<I *>(space);
    narrow_all({x, rows, weight->columns, of.rank, of.a, weight->columns, 1, 1.0f, tile, z}, threads);
    const LowRank low{z, of.b, of.rank, of.rank, 1, of.scaling};
    multiply({weight, x, rows, weight->columns, weight->rows, bias, &low, out, false, 1}, threads);
}

// From the gradient y[rows, weight rows]: to_x = y W + dz A with dz = scaling y B, to_a = dz^T x and
// to_b = scaling y^T z; those that are null are left out.
EXPORTED(void, adapted_back_bf16)(const Weight *weight, const uint16_t *y, int64_t rows, const uint16_t *x,
                                  const uint16_t *z, const Adapter *adapter, uint16_t *dz, uint16_t *to_x,
                                  float *to_a, float *to_b, void *space, int32_t threads) {
    const Adapter &of = *adapter;
    const int64_t rank = of.rank, inputs = weight->columns, outputs = weight->rows;
    auto *tile = static_cast<I *>(space);
    auto *of_dz = reinterpret_cast<uint32_t *>(static_cast<char *>(space) + tile_bytes(*weight, rank));
    auto *of_z = of_dz + (rows + 1) / 2 * rank;
    narrow_all({y, rows, outputs, rank, of.b, 1, rank, of.scaling, tile, dz}, threads);
    const LowRank low{dz, of.a, rank, 1, inputs, 1.0f};
    if (to_x) multiply({weight, y, rows, outputs, inputs, nullptr, &low, to_x, true, 1}, threads);
    if (to_a) pair_narrow(dz, rows, rank, of_dz);
    if (to_b) pair_narrow(z, rows, rank, of_z);
    Gradients g{{{of_dz, x, inputs, to_a, inputs, 1, 1.0f}, {of_z, y, outputs, to_b, 1, rank, of.scaling}},
                rows, rank};
    const int64_t strips = (to_a ? (inputs + kOutputs - 1) / kOutputs : 0) +
                           (to_b ? (outputs + kOutputs - 1) / kOutputs : 0);
    share_out(strips, threads, gradients, &g);
}

#endif
