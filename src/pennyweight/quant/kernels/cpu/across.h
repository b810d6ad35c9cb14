// Products of float32 matrices, whatever their strides on the left.
#pragma once

#include "exponential.h"
#include "strips.h"

namespace pennyweight {
namespace {

// A matrix in memory: rows by `row`, its other index by `step`.
struct Across {
    using Right = float;
    static constexpr int kHeld = Lanes::forward_rows;

    const float *at;
    int64_t row, step;

    // c[rows, vectors * width] += sum over k of this[row, k] * b[k, :], or = with `fresh`.
    template <int rows, int vectors>
    INLINE void tile(const float *b, int64_t b_step, int64_t steps, float *c, int64_t c_row,
                     bool fresh) const {
        V sum[rows][vectors];
        for (int m = 0; m < rows; ++m)
            for (int n = 0; n < vectors; ++n)
                sum[m][n] = fresh ? Lanes::zero() : Lanes::load(c + m * c_row + n * width);
        for (int64_t k = 0; k < steps; ++k, b += b_step) {
            V wide[vectors];
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) wide[n] = Lanes::load(b + n * width);
#pragma GCC unroll 8
            for (int m = 0; m < rows; ++m) {
                const V one = Lanes::all(at[m * row + k * step]);
#pragma GCC unroll 4
                for (int n = 0; n < vectors; ++n) sum[m][n] = Lanes::fused(one, wide[n], sum[m][n]);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) Lanes::store(c + m * c_row + n * width, sum[m][n]);
    }
};

// c[rows, columns] (+)= a b; columns are a multiple of the width.
void multiply(int64_t rows, int64_t columns, Across a, const float *b, int64_t b_step, int64_t steps,
              float *c, int64_t c_row, bool fresh) {
    strips(rows, columns, a, b, b_step, steps, c, c_row, fresh);
}

}  // namespace
}  // namespace pennyweight
