// Products of bf16 rows with a weight in 4 bits or in bf16, on processors that multiply pairs of bf16
// and sum them in float32. A 4-bit weight's values are rounded to bf16 as `dequantize` rounds them; an
// adapter's part is added in the same sum, which is rounded once. Layers that read the same rows go in
// one call, and the gradients that they give these rows are one sum.
//
// A tile of the weight stands in the second-level cache; rows are read where they lie. What is computed
// for a row does not depend on how many rows stand beside it.

#include "adapted.h"
#include "low_rank.h"
#include "threads.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

constexpr int kRows = kPairRows;
constexpr int64_t kDepth = 1536;   // inputs of a tile, 192 KB; more come after them
constexpr int64_t kApart = 512;    // rows whose sums wait between two depths, 128 KB
constexpr int64_t kPart = 64;      // rows worth a piece of work of their own
constexpr int64_t kMostTerms = 3;  // layers that read the same rows

// What x[rows, inputs] and low[rows, rank] add to a product: x times the weight, low times a float32
// factor, [outputs, rank], or [rank, outputs] in a product that is transposed.
struct Term {
    const Weight *weight;
    const uint16_t *x;
    int64_t inputs;
    const uint16_t *low;  // null: none
    const float *factor;
    int64_t rank;
    float scaling;

    int64_t depths() const { return (inputs + kDepth - 1) / kDepth; }
    int64_t depth() const { return (inputs / 32 + depths() - 1) / depths() * 32; }
};

struct Product {
    Term terms[kMostTerms];
    int64_t count, rows, outputs;
    const float *bias;  // null: none
    uint16_t *out;
    bool transposed;  // outputs are the weight's columns
    int64_t parts;    // of the rows

    int64_t strips() const { return (outputs + kOutputs - 1) / kOutputs; }
};

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

// Outputs first..first+held of a term: inputs k..k+deep of its weight, and its factor.
INLINE void fill(const Term &of, const Product &p, int64_t first, int64_t held, int64_t k, int64_t deep,
                 I *tile) {
    const auto with = dense(*of.weight) ? (p.transposed ? fill_dense_columns : fill_dense_rows)
                                        : (p.transposed ? fill_columns : fill_rows);
    with(*of.weight, first, held, k, deep, tile);
}

INLINE void fill_low(const Term &of, const Product &p, int64_t first, int64_t held, I *low) {
    if (p.transposed)
        fill_factor_columns(of.factor + first, p.outputs, held, of.rank, of.scaling, low, kOutputs / 16);
    else
        fill_factor_rows(of.factor + first * of.rank, of.rank, held, of.rank, of.scaling, low);
}

void multiply(const Product &p, int64_t piece) {
    alignas(64) I tile[kDepth / 2 * (kOutputs / 16)], low[kMostRank / 2 * (kOutputs / 16)];
    alignas(64) float apart[kApart * kOutputs];
    const int64_t first = piece / p.parts * kOutputs, held = least(kOutputs, p.outputs - first);
    const int64_t part = (p.rows + p.parts - 1) / p.parts;
    const int64_t start = piece % p.parts * part, stop = least(start + part, p.rows);
    const bool alone = p.count == 1 && p.terms[0].depths() == 1;  // no sum waits for another
    const int64_t at_once = alone ? p.rows : kApart;
    for (int64_t begin = start; begin < stop; begin += at_once) {
        const int64_t end = least(begin + at_once, stop);
        for (const Term *of = p.terms; of < p.terms + p.count; ++of) {
            if (of->low) fill_low(*of, p, first, held, low);
            for (int64_t k = 0; k < of->inputs; k += of->depth()) {
                const int64_t deep = least(of->depth(), of->inputs - k);
                const bool whole = k + deep == of->inputs, last = whole && of + 1 == p.terms + p.count;
                fill(*of, p, first, held, k, deep, tile);
                for (int64_t m = begin; m < end; m += kRows) {
                    const Rows rows{
                        of->x + m * of->inputs + k,
                        of->inputs,
                        deep / 2,
                        of->low && whole ? of->low + m * of->rank : nullptr,
                        of->rank,
                        p.bias ? p.bias + first : nullptr,
                        apart + (m - begin) * kOutputs * !alone,
                        k > 0 || of != p.terms,
                        last ? p.out + m * p.outputs + first : nullptr,
                        p.outputs,
                    };
                    if (held == kOutputs)
                        any_rows<4>(end - m, rows, tile, low);
                    else
                        any_rows<2>(end - m, rows, tile, low);
                }
            }
        }
    }
}

// Products, and gradients of factors, that do not wait for one another.
struct Work {
    Product products[kMostTerms];
    int64_t count;
    Outer outers[2 * kMostTerms];
    int64_t outer_count, rows;
};

void work_piece(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    for (const Product *p = w.products; p < w.products + w.count; ++p) {
        const int64_t pieces = p->strips() * p->parts;
        if (piece < pieces) return multiply(*p, piece);
        piece -= pieces;
    }
    for (const Outer *of = w.outers; of < w.outers + w.outer_count; ++of) {
        if (piece < of->strips()) return gradient(*of, w.rows, piece);
        piece -= of->strips();
    }
}

void run(Work &w, int threads) {
    int64_t strips = 0, parts = 1, pieces = 0;
    for (int64_t i = 0; i < w.count; ++i) strips += w.products[i].strips();
    while (strips && strips * parts < 3 * threads && w.rows > 2 * parts * kPart) ++parts;
    for (int64_t i = 0; i < w.count; ++i) w.products[i].parts = parts;
    pieces = strips * parts;
    for (int64_t i = 0; i < w.outer_count; ++i) pieces += w.outers[i].strips();
    share_out(pieces, threads, work_piece, &w);
}

struct Narrowings {
    Narrowing of[kMostTerms];
    int64_t count, rows, each;  // rows of a piece of work
};

void narrow_piece(void *given, int64_t piece) {
    const Narrowings &n = *static_cast<const Narrowings *>(given);
    const int64_t first = piece / n.count * n.each;
    narrow(n.of[piece % n.count], first, least(n.each, n.rows - first));
}

void run(Narrowings &n, int threads) {
    n.each = least(kNarrowed, (n.rows / (2 * threads) + 12) / 12 * 12);
    share_out((n.rows + n.each - 1) / n.each * n.count, threads, narrow_piece, &n);
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

// out[rows, outputs] = x W^T + bias, or x W where `transposed`. Rows and columns of the weight are
// multiples of 32, its blocks too; it is held in 4 bits, or in bf16.
EXPORTED(void, multiply_bf16)(const Weight *weight, const uint16_t *x, int64_t rows, const float *bias,
                              bool transposed, uint16_t *out, int32_t threads) {
    const int64_t inputs = transposed ? weight->rows : weight->columns;
    const int64_t outputs = transposed ? weight->columns : weight->rows;
    Work w{};
    w.products[0] = {{{weight, x, inputs, nullptr, nullptr, 0, 0.0f}}, 1, rows, outputs, bias, out, transposed, 1};
    w.count = 1, w.rows = rows;
    run(w, threads);
}

EXPORTED(void, adapted_bf16)(const Adapted *layers, int64_t count, const uint16_t *x, int64_t rows,
                             int32_t threads) {
    Narrowings n{};
    Work w{};
    n.rows = w.rows = rows;
    for (const Adapted *of = layers; of < layers + count; ++of) {
        const int64_t inputs = of->weight->columns;
        if (of->rank) n.of[n.count++] = {x, inputs, of->a, of->rank, 1.0f, false, static_cast<uint16_t *>(of->z)};
        const auto *low = static_cast<const uint16_t *>(of->rank ? of->z : nullptr);
        if (of->y)
            w.products[w.count++] = {{{of->weight, x, inputs, low, of->b, of->rank, of->scaling}},
                                     1, rows, of->weight->rows, of->bias, static_cast<uint16_t *>(of->y), false, 1};
    }
    if (n.count) run(n, threads);
    run(w, threads);
}

EXPORTED(void, adapted_back_bf16)(const Adapted *layers, int64_t count, const uint16_t *x, int64_t rows,
                                  uint16_t *to_x, int32_t threads) {
    Narrowings n{};
    Work w{};
    n.rows = w.rows = rows;
    Product &sum = w.products[0];
    sum = {{}, 0, rows, layers->weight->columns, nullptr, to_x, true, 1};
    for (const Adapted *of = layers; of < layers + count; ++of) {
        const int64_t inputs = of->weight->columns, outputs = of->weight->rows;
        const auto *low = static_cast<const uint16_t *>(of->rank ? of->dz : nullptr);
        const auto *y = static_cast<const uint16_t *>(of->y), *z = static_cast<const uint16_t *>(of->z);
        if (of->rank)
            n.of[n.count++] = {y, outputs, of->b, of->rank, of->scaling, true, static_cast<uint16_t *>(of->dz)};
        sum.terms[sum.count++] = {of->weight, y, outputs, low, of->a, of->rank, 1.0f};
        if (of->to_a) w.outers[w.outer_count++] = {low, x, of->rank, inputs, of->to_a, false, 1.0f};
        if (of->to_b) w.outers[w.outer_count++] = {z, y, of->rank, outputs, of->to_b, true, of->scaling};
    }
    w.count = to_x ? 1 : 0;
    if (n.count) run(n, threads);
    run(w, threads);
}

#endif
