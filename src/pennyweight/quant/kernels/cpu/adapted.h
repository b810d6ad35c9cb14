// Products that take adapters along: what they are given, and their names.
#pragma once

#include "weight.h"

namespace pennyweight {

// A frozen layer and the adapter beside it, float32 masters a[rank, columns] and b[rows, rank] of the
// weight; and where its numbers lie, in the type of the rows.
struct Adapted {
    const Weight *weight;
    const float *bias;  // null: none
    const float *a, *b;
    int64_t rank;  // 0: no adapter
    float scaling;
    void *z;   // [rows, rank]
    void *y;   // [rows, weight rows]: what it gives, or the gradient of that
    void *dz;  // [rows, rank]
    float *to_a, *to_b;
};

}  // namespace pennyweight

// For each layer z = x A^T, and y = x W^T + bias + scaling z B^T where there is a place for it.
EXPORTED(void, adapted)(const pennyweight::Adapted *layers, int64_t count, const float *x, int64_t rows,
                        int32_t threads);
// From the gradients y and with dz = scaling y B: to_x, the sum over layers of y W + dz A,
// to_a = dz^T x and to_b = scaling y^T z; those that are null are left out. `spare` is as large as
// x, where there are several layers.
EXPORTED(void, adapted_back)(const pennyweight::Adapted *layers, int64_t count, const float *x, int64_t rows,
                             float *to_x, float *spare, int32_t threads);
