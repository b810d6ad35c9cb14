// The exponential, for softmax and for gates, and the logarithm.
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

// ln x of normal numbers x > 0, rounded once: with x = 2^n m and s = (m - 1) / (m + 1) it is
// n ln 2 + 2 (s + s^3 / 3 + s^5 / 5 + ...). What is not finite stays so.
INLINE float logarithm(float x) {
    const uint32_t bits = bits_of(x), from = bits_of(0.70710678f);
    const auto n = static_cast<int32_t>(bits - from) >> 23;
    const double m = float_of(bits - (static_cast<uint32_t>(n) << 23)), s = (m - 1.0) / (m + 1.0), q = s * s;
    const double series = q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q / 11))));
    return static_cast<float>(n * 0.69314718055994531 + 2.0 * (s + s * series)) + (x - x);
}

}  // namespace
}  // namespace pennyweight
