// A product walked over in strips of rows and columns that a kernel call keeps in registers.
#pragma once

#include "lanes.h"

namespace pennyweight {
namespace {

// `Left` is a matrix by rows: `at`, `row`, `step`, the type of what it meets, how many rows one call
// computes, and what a step of a sum is: `one` number of its own, in each lane, `many` of the other's.
//
// c[rows, vectors * width] += sum over k of a[row, k] * b[k, :], or = with `fresh`.
template <int rows, int vectors, class Left>
INLINE void tile(Left a, const typename Left::Right *b, int64_t b_step, int64_t steps, float *c,
                 int64_t c_row, bool fresh) {
    typename Lanes::V sum[rows][vectors];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < vectors; ++n)
            sum[m][n] = fresh ? Lanes::zero() : Lanes::load(c + m * c_row + n * width);
    for (int64_t k = 0; k < steps; ++k, b += b_step) {
        typename Left::Wide wide[vectors];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) wide[n] = Left::many(b + n * width);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const typename Left::Wide one = a.one(m, k);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) sum[m][n] = Left::add(sum[m][n], one, wide[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) Lanes::store(c + m * c_row + n * width, sum[m][n]);
}

template <int vectors, class Left, int rows = Left::kHeld>
INLINE void rows_of(int64_t held, Left a, const typename Left::Right *b, int64_t b_step, int64_t steps,
                    float *c, int64_t c_row, bool fresh) {
    if constexpr (rows == 1)
        tile<1, vectors>(a, b, b_step, steps, c, c_row, fresh);
    else if (held == rows)
        tile<rows, vectors>(a, b, b_step, steps, c, c_row, fresh);
    else
        rows_of<vectors, Left, rows - 1>(held, a, b, b_step, steps, c, c_row, fresh);
}

template <int vectors, class Left>
void strip(int64_t rows, Left a, const typename Left::Right *b, int64_t b_step, int64_t steps, float *c,
           int64_t c_row, bool fresh) {
    for (int64_t m = 0; m < rows; m += Left::kHeld) {
        const Left part{a.at + m * a.row, a.row, a.step};
        rows_of<vectors, Left>(least(Left::kHeld, rows - m), part, b, b_step, steps, c + m * c_row, c_row,
                               fresh);
    }
}

// c[rows, columns] (+)= a b; columns are a multiple of the width.
template <class Left>
void strips(int64_t rows, int64_t columns, Left a, const typename Left::Right *b, int64_t b_step,
            int64_t steps, float *c, int64_t c_row, bool fresh) {
    int64_t n = 0;
    for (; n + 4 * width <= columns; n += 4 * width)
        strip<4>(rows, a, b + n, b_step, steps, c + n, c_row, fresh);
    for (; n + 2 * width <= columns; n += 2 * width)
        strip<2>(rows, a, b + n, b_step, steps, c + n, c_row, fresh);
    for (; n < columns; n += width) strip<1>(rows, a, b + n, b_step, steps, c + n, c_row, fresh);
}

}  // namespace
}  // namespace pennyweight
