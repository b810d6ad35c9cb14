// A product walked over in strips of rows and columns that a kernel call keeps in registers.
#pragma once

#include "lanes.h"

namespace pennyweight {
namespace {

// `Left` is a matrix by rows: `at`, `row`, `step`, the type of what it meets, how many rows one call
// computes, and the call, `tile<rows, vectors>`.
template <int vectors, class Left, int rows = Left::kHeld>
INLINE void rows_of(int64_t held, Left a, const typename Left::Right *b, int64_t b_step, int64_t steps,
                    float *c, int64_t c_row, bool fresh) {
    if constexpr (rows == 1)
        a.template tile<1, vectors>(b, b_step, steps, c, c_row, fresh);
    else if (held == rows)
        a.template tile<rows, vectors>(b, b_step, steps, c, c_row, fresh);
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
