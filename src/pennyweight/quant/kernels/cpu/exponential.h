// The exponential, for softmax and for gates.
#pragma once

#include "lanes.h"

namespace pennyweight {
namespace {

using V = Lanes::V;
typedef int32_t Whole __attribute__((vector_size(sizeof(V))));

INLINE V larger(V a, V b) { return a > b ? a : b; }

// e^x for x <= 0, to two units in the last place; what would be subnormal is the smallest normal.
INLINE V exponential(V x) {
    const V shift = Lanes::all(12582912.0f);  // 1.5 * 2^23: its sum with x is rounded to whole
    x = larger(x, Lanes::all(-87.3f));
    const V moved = Lanes::fused(x, Lanes::all(1.44269504f), shift), n = moved - shift;
    V r = Lanes::fused(n, Lanes::all(-0.693145752f), x);
    r = Lanes::fused(n, Lanes::all(-1.42860677e-6f), r);
    V p = Lanes::all(1.38888889e-3f);
    p = Lanes::fused(p, r, Lanes::all(8.33333333e-3f));
    p = Lanes::fused(p, r, Lanes::all(4.16666667e-2f));
    p = Lanes::fused(p, r, Lanes::all(1.66666667e-1f));
    p = Lanes::fused(p, r, Lanes::all(0.5f));
    p = Lanes::fused(p, r, Lanes::all(1.0f));
    p = Lanes::fused(p, r, Lanes::all(1.0f));
    return (V)((Whole)p + ((Whole)moved << 23));
}

}  // namespace
}  // namespace pennyweight
