// Products of float32 rows with a stored weight.
#pragma once

#include "weight.h"

// out[rows, weight rows] = x[rows, weight columns] W^T + bias
EXPORTED(void, forward)(const pennyweight::Weight *weight, const float *x, int64_t rows, const float *bias,
                        float *out, int32_t threads);
// out[rows, weight columns] = y[rows, weight rows] W
EXPORTED(void, backward)(const pennyweight::Weight *weight, const float *y, int64_t rows, float *out,
                         int32_t threads);
