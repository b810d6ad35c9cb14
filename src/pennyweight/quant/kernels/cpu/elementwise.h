// What stands between a decoder layer's products: what its kernels are given, and their names.
#pragma once

#include "lanes.h"

namespace pennyweight {

struct Norm {
    const void *x, *grad;  // grad: null in the forward pass
    const float *weight;
    float *inverse;  // 1 / rms of each row; read where `known`
    void *out;
    int64_t rows, columns;
    float eps;
    bool known, wide_weight;  // wide: 1 + weight in float32, before the rows are rounded
};

struct Gate {
    const void *gate, *up, *grad;  // grad: null in the forward pass
    void *out, *to_gate, *to_up;
    int64_t count;
};

// Heads of tokens, by strides; each head in one piece.
struct Heads {
    const void *from;
    void *to;
    int64_t count, from_head, from_token, to_head, to_token;
};

struct Rotation {
    Heads of[2];  // queries and keys
    const void *cos, *sin;  // [tokens, width]
    int64_t tokens, width;
    bool back;
};

}  // namespace pennyweight

// Columns, and the count of numbers in a gate, are multiples of 16.
EXPORTED(void, norm)(const pennyweight::Norm *given, pennyweight::Type type, int32_t threads);
EXPORTED(void, gate)(const pennyweight::Gate *given, pennyweight::Type type, int32_t threads);
// Halves of a head are multiples of 16 wide; what is written may be what is read.
EXPORTED(void, rotate)(const pennyweight::Rotation *given, pennyweight::Type type, int32_t threads);
