// Products with a stored weight that never stands in memory whole: a tile of it is dequantized
// into a buffer that the second-level cache holds and is multiplied there by all rows at hand.
//
// What is computed for a row does not depend on how many rows stand beside it: one row alone and
// in any batch gets the same bits.

#include <stdlib.h>

#include "threads.h"
#include "weight.h"

namespace pennyweight {
namespace {

constexpr int64_t kTile = 1 << 14;   // floats of a tile of the weight, 64 KB
constexpr int64_t kDepth = 512;      // inputs summed before lanes are: a multiple of every width
constexpr int64_t kQuad = 4;         // outputs that one kernel call computes for its rows
constexpr int64_t kAhead = 8;        // rows of codes that are asked for before they are read
constexpr int64_t kPackedFloats = 1 << 21;  // of packed rows, 8 MB; more rows come after them

INLINE int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Product {
    const Weight *weight;
    const float *x;  // [rows, columns] of the weight's other side
    int64_t rows;
    const float *bias;  // null: none
    float *out;
    float *packed;
    int64_t tile;  // outputs of one piece of work
};

// One packing buffer is kept from call to call; a second caller at the same time makes its own.
float *kept = nullptr;
int kept_taken = 0;

float *take_packed(bool &own) {
    own = __atomic_exchange_n(&kept_taken, 1, __ATOMIC_ACQUIRE) != 0;
    float *found = own ? nullptr : kept;
    if (!found) {
        void *made = nullptr;
        if (posix_memalign(&made, 64, kPackedFloats * sizeof(float)) != 0) abort();
        found = static_cast<float *>(made);
        if (!own) kept = found;
    }
    return found;
}

void give_packed(float *packed, bool own) {
    if (own)
        free(packed);
    else
        __atomic_store_n(&kept_taken, 0, __ATOMIC_RELEASE);
}

// --- y = x W^T: lanes along the inputs -----------------------------------------------------------

constexpr int kForwardRows = Lanes::forward_rows;

// Rows in groups; in a group, vectors of the same inputs of its rows side by side.
void pack_forward(void *given, int64_t group) {
    const Product &p = *static_cast<const Product *>(given);
    const int64_t columns = p.weight->columns, first = group * kForwardRows;
    const int64_t held = least(kForwardRows, p.rows - first);
    float *to = p.packed + first * up(columns, width);
    for (int64_t k = 0; k < columns; k += width)
        for (int64_t m = 0; m < held; ++m, to += width) {
            const float *from = p.x + (first + m) * columns + k;
            if (k + width <= columns) {
                Lanes::store(to, Lanes::load(from));
            } else {
                for (int64_t i = 0; i < width; ++i) to[i] = k + i < columns ? from[i] : 0.0f;
            }
        }
}

template <int rows>
INLINE void forward_kernel(const float *x, const float *w, int64_t steps, float (*sums)[kQuad]) {
    Lanes::V sum[rows][kQuad];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < kQuad; ++n) sum[m][n] = Lanes::zero();
    for (int64_t k = 0; k < steps; ++k, x += rows * width, w += kQuad * width) {
        Lanes::V wide[kQuad];
#pragma GCC unroll 4
        for (int n = 0; n < kQuad; ++n) wide[n] = Lanes::load(w + n * width);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const Lanes::V row = Lanes::load(x + m * width);
#pragma GCC unroll 4
            for (int n = 0; n < kQuad; ++n) sum[m][n] = Lanes::fused(row, wide[n], sum[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
        Lanes::sums(sums[m], sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
}

template <int rows>
void forward_rows(const float *x, const float *w, int64_t steps, float (*sums)[kQuad]) {
    forward_kernel<rows>(x, w, steps, sums);
}

template <int rows = kForwardRows>
INLINE void forward_any(int held, const float *x, const float *w, int64_t steps, float (*sums)[kQuad]) {
    if constexpr (rows == 1)
        forward_rows<1>(x, w, steps, sums);
    else if (held == rows)
        forward_rows<rows>(x, w, steps, sums);
    else
        forward_any<rows - 1>(held, x, w, steps, sums);
}

// From memory into the first-level cache.
INLINE void ask_for(const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// Codes of a row, which lie too far from those of the row before for the processor to foresee them.
INLINE void ask_for_codes(const Weight &w, int64_t row, int64_t first, int64_t count) {
    if (!w.levels || row >= w.rows) return;
    const auto *codes = static_cast<const uint8_t *>(w.codes) + (row * w.columns + first) / 2;
    for (int64_t i = 0; i < count / 2; i += 64) __builtin_prefetch(codes + i);
}

constexpr int kDirectRows = 4;

// For few rows values go from the codes into the sums without a tile between; the sums are those
// of `forward_kernel`, in its order. Weight rows begin where blocks do.
template <int rows, Type type>
void direct_kernel(const Weight &w, const int64_t *outputs, int64_t k, int64_t depth, const float *x,
                   float (*sums)[kQuad]) {
    const auto levels = Lanes::levels(w.levels);
    const int64_t run = least(depth, int64_t{1} << w.block_shift) / width;
    Lanes::V sum[rows][kQuad];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < kQuad; ++n) sum[m][n] = Lanes::zero();
    for (int64_t j = 0; j < depth / width; j += run) {
        Lanes::Scaled scaled[kQuad];
        const uint8_t *codes[kQuad];
#pragma GCC unroll 4
        for (int n = 0; n < kQuad; ++n) {
            const int64_t at = outputs[n] * w.columns + k + j * width;
            scaled[n] = Lanes::scaled(levels, block_scale(w, at >> w.block_shift), type);
            codes[n] = static_cast<const uint8_t *>(w.codes) + at / 2;
        }
        for (int64_t i = 0; i < run; i += kLookedUp, x += kLookedUp * rows * width) {
#pragma GCC unroll 4
            for (int n = 0; n < kQuad; ++n) {
                Lanes::V values[kLookedUp];
                Lanes::look_up(values, scaled[n], codes[n] + i * width / 2);
#pragma GCC unroll 8
                for (int v = 0; v < kLookedUp; ++v)
#pragma GCC unroll 4
                    for (int m = 0; m < rows; ++m)
                        sum[m][n] = Lanes::fused(Lanes::load(x + (v * rows + m) * width), values[v], sum[m][n]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m)
        Lanes::sums(sums[m], sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
}

template <int rows>
void direct_rows(const Weight &w, const int64_t *outputs, int64_t k, int64_t depth, const float *x,
                 float (*sums)[kQuad]) {
    switch (w.value_type) {
        case Type::float32: return direct_kernel<rows, Type::float32>(w, outputs, k, depth, x, sums);
        case Type::bfloat16: return direct_kernel<rows, Type::bfloat16>(w, outputs, k, depth, x, sums);
        case Type::float16: return direct_kernel<rows, Type::float16>(w, outputs, k, depth, x, sums);
    }
}

void direct(void *given, int64_t piece) {
    const Product &p = *static_cast<const Product *>(given);
    const Weight &w = *p.weight;
    const auto multiply = p.rows == 1   ? direct_rows<1>
                          : p.rows == 2 ? direct_rows<2>
                          : p.rows == 3 ? direct_rows<3>
                                        : direct_rows<4>;
    const int64_t first = piece * p.tile, stop = least(first + p.tile, w.rows);
    for (int64_t n = first; n < stop; n += kQuad) {
        int64_t outputs[kQuad];
        for (int64_t i = 0; i < kQuad; ++i) outputs[i] = least(n + i, w.rows - 1);
        for (int64_t k = 0; k < w.columns; k += kDepth) {
            float sums[kDirectRows][kQuad];
            multiply(w, outputs, k, least(kDepth, w.columns - k), p.packed + k * p.rows, sums);
            for (int64_t r = 0; r < p.rows; ++r)
                for (int64_t i = 0; i < least(kQuad, stop - n); ++i) {
                    float *y = p.out + r * w.rows + n + i;
                    const float before = k ? *y : p.bias ? p.bias[n + i] : 0.0f;
                    *y = before + sums[r][i];
                }
        }
    }
}

bool goes_direct(const Weight &w, int64_t rows) {
    const int64_t block = int64_t{1} << w.block_shift;
    return w.levels && rows <= least(kDirectRows, kForwardRows) && w.columns % block == 0;
}

void forward(void *given, int64_t piece) {
    const Product &p = *static_cast<const Product *>(given);
    const Weight &w = *p.weight;
    alignas(64) float tile[kTile];
    const int64_t first = piece * p.tile, held = least(p.tile, w.rows - first);
    for (int64_t k = 0; k < w.columns; k += kDepth) {
        const int64_t depth = least(kDepth, w.columns - k), steps = up(depth, width) / width;
        for (int64_t n = 0; n < up(held, kQuad); ++n) {
            float *to = tile + (n / kQuad) * (kQuad * steps * width) + n % kQuad * width;
            // Past the last output its values stand in once more; their sums go nowhere.
            const int64_t row = first + least(n, held - 1);
            ask_for_codes(w, row + kAhead, k, depth);
            each_vector(w, row * w.columns + k, depth,
                        [&](int64_t j, Lanes::V v) __attribute__((always_inline)) {
                            Lanes::store(to + j * (kQuad * width), v);
                        });
        }
        for (int64_t m = 0; m < p.rows; m += kForwardRows) {
            const int rows = static_cast<int>(least(kForwardRows, p.rows - m));
            const float *x = p.packed + m * up(w.columns, width) + k * rows;
            // The rows that come next are asked for in parts, one beside each product.
            const float *next = x + kForwardRows * up(w.columns, width);
            const int64_t part = steps * width * kForwardRows / p.tile;
            for (int64_t n = 0; n < held; n += kQuad) {
                float sums[kForwardRows][kQuad];
                if (m + kForwardRows < p.rows) ask_for(next + n * part, part * kQuad);
                forward_any(rows, x, tile + n * (steps * width), steps, sums);
                for (int r = 0; r < rows; ++r)
                    for (int64_t i = 0; i < least(kQuad, held - n); ++i) {
                        float *y = p.out + (m + r) * w.rows + first + n + i;
                        const float before = k ? *y : p.bias ? p.bias[first + n + i] : 0.0f;
                        *y = before + sums[r][i];
                    }
            }
        }
    }
}

// --- x = y W: lanes along the outputs, which are the weight's columns ------------------------------

constexpr int kBackwardRows = Lanes::backward_rows;
constexpr int64_t kPair = 2 * width;  // outputs that one kernel call computes for its rows
// Inputs summed by themselves, before they go to the sum of all: one sum over thousands in a row
// would lose two bits. A divisor of every tile's depth, so that it does not depend on the threads.
constexpr int64_t kSummed = 64;

// Rows in groups; in a group, the same input of its rows side by side.
void pack_backward(void *given, int64_t group) {
    const Product &p = *static_cast<const Product *>(given);
    const int64_t inputs = p.weight->rows, first = group * kBackwardRows;
    const int64_t held = least(kBackwardRows, p.rows - first);
    float *to = p.packed + first * inputs;
    const float *from = p.x + first * inputs;
    for (int64_t n = 0; n < inputs; ++n)
        for (int64_t m = 0; m < held; ++m) *to++ = from[m * inputs + n];
}

template <int rows>
void backward_rows(const float *y, const float *w, int64_t steps, float *out, int64_t stride) {
    Lanes::V low[rows], high[rows];
    for (int m = 0; m < rows; ++m) {
        low[m] = high[m] = Lanes::zero();
        __builtin_prefetch(out + m * stride, 1);
    }
    for (int64_t n = 0; n < steps; ++n, y += rows, w += kPair) {
        const Lanes::V left = Lanes::load(w), right = Lanes::load(w + width);
#pragma GCC unroll 12
        for (int m = 0; m < rows; ++m) {
            const Lanes::V factor = Lanes::all(y[m]);
            low[m] = Lanes::fused(factor, left, low[m]);
            high[m] = Lanes::fused(factor, right, high[m]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) {
        float *to = out + m * stride;
        Lanes::store(to, Lanes::plus(Lanes::load(to), low[m]));
        Lanes::store(to + width, Lanes::plus(Lanes::load(to + width), high[m]));
    }
}

template <int rows = kBackwardRows>
INLINE void backward_any(int held, const float *y, const float *w, int64_t steps, float *out,
                         int64_t stride) {
    if constexpr (rows == 1)
        backward_rows<1>(y, w, steps, out, stride);
    else if (held == rows)
        backward_rows<rows>(y, w, steps, out, stride);
    else
        backward_any<rows - 1>(held, y, w, steps, out, stride);
}

INLINE void in_sums(int rows, const float *y, const float *w, int64_t steps, float *out, int64_t stride) {
    for (int64_t n = 0; n < steps; n += kSummed)
        backward_any(rows, y + n * rows, w + n * kPair, least(kSummed, steps - n), out, stride);
}

void backward(void *given, int64_t piece) {
    const Product &p = *static_cast<const Product *>(given);
    const Weight &w = *p.weight;
    alignas(64) float tile[kTile];
    const int64_t first = piece * p.tile, held = least(p.tile, w.columns - first);
    const int64_t depth = kTile / p.tile;
    for (int64_t m = 0; m < p.rows; ++m) memset(p.out + m * w.columns + first, 0, held * sizeof(float));
    for (int64_t n = 0; n < w.rows; n += depth) {
        const int64_t steps = least(depth, w.rows - n);
        for (int64_t i = 0; i < steps; ++i) {
            ask_for_codes(w, n + i + kAhead, first, held);
            each_vector(w, (n + i) * w.columns + first, held,
                        [&](int64_t j, Lanes::V v) __attribute__((always_inline)) {
                            Lanes::store(tile + ((j >> 1) * steps + i) * kPair + (j & 1) * width, v);
                        });
        }
        for (int64_t m = 0; m < p.rows; m += kBackwardRows) {
            const int rows = static_cast<int>(least(kBackwardRows, p.rows - m));
            const float *y = p.packed + m * w.rows + n * rows;
            for (int64_t k = 0; k < held; k += kPair) {
                float *out = p.out + m * w.columns + first + k;
                const float *of = tile + k * steps;
                if (k + kPair <= held) {
                    in_sums(rows, y, of, steps, out, w.columns);
                    continue;
                }
                // The last columns by way of a full-width copy.
                float edge[kBackwardRows * kPair] = {};
                for (int r = 0; r < rows; ++r)
                    memcpy(edge + r * kPair, out + r * w.columns, (held - k) * sizeof(float));
                in_sums(rows, y, of, steps, edge, kPair);
                for (int r = 0; r < rows; ++r)
                    memcpy(out + r * w.columns, edge + r * kPair, (held - k) * sizeof(float));
            }
        }
    }
}

// Rows as many at once as the packing buffer holds.
void in_parts(Product p, int64_t inputs, int64_t outputs, int group, void (*pack)(void *, int64_t),
              void (*multiply)(void *, int64_t), int threads) {
    bool own;
    float *packed = take_packed(own);
    const int64_t stored = up(inputs, width), total = p.rows;
    int64_t most = kPackedFloats / stored / group * group;
    float *apart = nullptr;
    if (most == 0) {  // inputs beyond any model's: a buffer for this call alone
        most = group;
        void *made = nullptr;
        if (posix_memalign(&made, 64, group * stored * sizeof(float)) != 0) abort();
        apart = static_cast<float *>(made);
    }
    p.packed = apart ? apart : packed;
    const float *x = p.x;
    float *out = p.out;
    for (int64_t m = 0; m < total; m += most) {
        p.rows = least(most, total - m);
        p.x = x + m * inputs;
        p.out = out + m * outputs;
        share_out((p.rows + group - 1) / group, threads, pack, &p);
        share_out((outputs + p.tile - 1) / p.tile, threads, multiply, &p);
    }
    free(apart);
    give_packed(packed, own);
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

// out[rows, weight rows] = x[rows, weight columns] W^T + bias
EXPORTED(void, forward)(const Weight *weight, const float *x, int64_t rows, const float *bias,
                        float *out, int32_t threads) {
    Product p{weight, x, rows, bias, out, nullptr, kTile / kDepth};
    const auto multiply = goes_direct(*weight, rows) ? direct : forward;
    in_parts(p, weight->columns, weight->rows, kForwardRows, pack_forward, multiply, threads);
}

// out[rows, weight columns] = y[rows, weight rows] W
EXPORTED(void, backward)(const Weight *weight, const float *y, int64_t rows, float *out,
                         int32_t threads) {
    // Wide tiles read the codes in longer runs; narrower ones keep every thread at work.
    int64_t tile = 256;
    while (tile > 64 && tile * threads * 4 > weight->columns) tile /= 2;
    Product p{weight, y, rows, nullptr, out, nullptr, tile};
    in_parts(p, weight->rows, weight->columns, kBackwardRows, pack_backward, backward, threads);
}
