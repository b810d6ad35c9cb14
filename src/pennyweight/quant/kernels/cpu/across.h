// Products of float32 matrices, whatever their strides on the left.
#pragma once

#include "exponential.h"
#include "strips.h"

namespace pennyweight {
namespace {

// A matrix in memory: rows by `row`, its other index by `step`.
struct Across {
    using Right = float;
    using Wide = V;
    static constexpr int kHeld = Lanes::forward_rows;

    const float *at;
    int64_t row, step;

    INLINE V one(int64_t m, int64_t k) const { return Lanes::all(at[m * row + k * step]); }
    INLINE static V many(const float *b) { return Lanes::load(b); }
    INLINE static V add(V sum, V one, V many) { return Lanes::fused(one, many, sum); }
};

// c[rows, columns] (+)= a b; columns are a multiple of the width.
void multiply(int64_t rows, int64_t columns, Across a, const float *b, int64_t b_step, int64_t steps,
              float *c, int64_t c_row, bool fresh) {
    strips(rows, columns, a, b, b_step, steps, c, c_row, fresh);
}

}  // namespace
}  // namespace pennyweight
