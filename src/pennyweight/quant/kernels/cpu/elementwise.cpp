// What stands between a decoder layer's products, each in one pass over memory: RMSNorm (Zhang &
// Sennrich 2019, section 3), the gate of SwiGLU (Shazeer 2020) and rotary positions (Su et al. 2021,
// section 3.2.2), with their gradients. Numbers are stored in float32, bf16 or fp16; the arithmetic is
// float32.

#include "elementwise.h"

#include "exponential.h"
#include "stored.h"
#include "threads.h"

namespace pennyweight {
namespace {

constexpr int64_t kPiece = 1 << 14;  // numbers of one piece of work

template <Type type>
INLINE V weighed(const Norm &n, V normalized, int64_t k) {
    const V weight = Lanes::load(n.weight + k);
    if (n.wide_weight) return normalized * (Lanes::all(1.0f) + weight);
    return Lanes::rounded(normalized, type) * weight;
}

template <Type type>
void norm(void *given, int64_t piece) {
    const Norm &n = *static_cast<const Norm *>(given);
    const int64_t each = kPiece / n.columns + 1, stop = least((piece + 1) * each, n.rows);
    for (int64_t row = piece * each; row < stop; ++row) {
        const int64_t at = row * n.columns;
        if (!n.known) {
            V squares[2] = {Lanes::zero(), Lanes::zero()};
            for (int64_t k = 0; k < n.columns; k += width) {
                const V x = load<type>(n.x, at + k);
                squares[k / width & 1] = Lanes::fused(x, x, squares[k / width & 1]);
            }
            const float mean = sum_of(squares[0] + squares[1]) / static_cast<float>(n.columns);
            n.inverse[row] = 1.0f / __builtin_sqrtf(mean + n.eps);
        }
        const V inverse = Lanes::all(n.inverse[row]);
        for (int64_t k = 0; k < n.columns; k += width)
            store<type>(n.out, at + k, weighed<type>(n, load<type>(n.x, at + k) * inverse, k));
    }
}

// With n = x / rms and g = w dy: (g - n mean(g n)) / rms.
template <Type type>
void norm_back(void *given, int64_t piece) {
    const Norm &n = *static_cast<const Norm *>(given);
    const int64_t each = kPiece / n.columns + 1, stop = least((piece + 1) * each, n.rows);
    const V one = Lanes::all(n.wide_weight ? 1.0f : 0.0f);
    for (int64_t row = piece * each; row < stop; ++row) {
        const int64_t at = row * n.columns;
        const V inverse = Lanes::all(n.inverse[row]);
        V sums[2] = {Lanes::zero(), Lanes::zero()};
        for (int64_t k = 0; k < n.columns; k += width) {
            const V g = load<type>(n.grad, at + k) * (one + Lanes::load(n.weight + k));
            const V x = load<type>(n.x, at + k) * inverse;
            sums[k / width & 1] = Lanes::fused(g, x, sums[k / width & 1]);
        }
        const V along = Lanes::all(sum_of(sums[0] + sums[1]) / static_cast<float>(n.columns));
        for (int64_t k = 0; k < n.columns; k += width) {
            const V g = load<type>(n.grad, at + k) * (one + Lanes::load(n.weight + k));
            const V x = load<type>(n.x, at + k) * inverse;
            store<type>(n.out, at + k, (g - x * along) * inverse);
        }
    }
}

INLINE V sigmoid(V x) {
    const V zero = Lanes::zero(), one = Lanes::all(1.0f);
    const V small = exponential(x > zero ? zero - x : x);  // e^-|x|
    return (x > zero ? one : small) / (one + small);
}

// silu(gate) * up, or the gradients of both.
template <Type type>
INLINE void gate_vector(const Gate &g, int64_t at) {
    const V x = load<type>(g.gate, at), up = load<type>(g.up, at), s = sigmoid(x);
    if (!g.grad) return store<type>(g.out, at, x * s * up);
    const V grad = load<type>(g.grad, at);
    store<type>(g.to_up, at, grad * x * s);
    store<type>(g.to_gate, at, grad * up * s * (Lanes::all(1.0f) + x * (Lanes::all(1.0f) - s)));
}

template <Type type>
void gate(void *given, int64_t piece) {
    const Gate &g = *static_cast<const Gate *>(given);
    const int64_t stop = least((piece + 1) * kPiece, g.count);
    for (int64_t at = piece * kPiece; at < stop; at += width) gate_vector<type>(g, at);
}

// The halves of each head turned by the token's angles: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; or back.
template <Type type>
void rotate(void *given, int64_t token) {
    const Rotation &r = *static_cast<const Rotation *>(given);
    const int64_t half = r.width / 2, angle = token * r.width;
    for (const Heads &h : r.of)
        for (int64_t i = 0; i < h.count; ++i) {
            const int64_t from = i * h.from_head + token * h.from_token;
            const int64_t to = i * h.to_head + token * h.to_token;
            for (int64_t k = 0; k < half; k += width) {
                const V x1 = load<type>(h.from, from + k), x2 = load<type>(h.from, from + half + k);
                const V c1 = load<type>(r.cos, angle + k), c2 = load<type>(r.cos, angle + half + k);
                V s1 = load<type>(r.sin, angle + k), s2 = load<type>(r.sin, angle + half + k);
                if (r.back) {
                    const V turned = s1;
                    s1 = Lanes::zero() - s2, s2 = Lanes::zero() - turned;
                }
                store<type>(h.to, to + k, x1 * c1 - x2 * s1);
                store<type>(h.to, to + half + k, x2 * c2 + x1 * s2);
            }
        }
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

EXPORTED(void, norm)(const Norm *given, Type type, int32_t threads) {
    const int64_t each = kPiece / given->columns + 1;
    share_out((given->rows + each - 1) / each, threads,
              given->grad ? OF_TYPE(norm_back, type) : OF_TYPE(norm, type), const_cast<Norm *>(given));
}

EXPORTED(void, gate)(const Gate *given, Type type, int32_t threads) {
    share_out((given->count + kPiece - 1) / kPiece, threads, OF_TYPE(gate, type), const_cast<Gate *>(given));
}

EXPORTED(void, rotate)(const Rotation *given, Type type, int32_t threads) {
    share_out(given->tokens, threads, OF_TYPE(rotate, type), const_cast<Rotation *>(given));
}
