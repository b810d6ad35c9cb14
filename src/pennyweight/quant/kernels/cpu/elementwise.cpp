// What stands between a decoder layer's products, each in one pass over memory: RMSNorm (Zhang &
// Sennrich 2019, section 3) and the gate of SwiGLU (Shazeer 2020), with their gradients. Numbers are
// stored in float32, bf16 or fp16; the arithmetic is float32.

#include "exponential.h"
#include "threads.h"

namespace pennyweight {
namespace {

constexpr int64_t kPiece = 1 << 14;  // numbers of one piece of work

// Numbers in memory, of a type that is the template's; past the last whole vector one by one.
template <Type type>
INLINE V load(const void *from, int64_t at) {
    if constexpr (type == Type::float32)
        return Lanes::load(static_cast<const float *>(from) + at);
    else
        return Lanes::load(static_cast<const uint16_t *>(from) + at, type);
}

template <Type type>
INLINE void store(void *to, int64_t at, V v) {
    if constexpr (type == Type::float32)
        Lanes::store(static_cast<float *>(to) + at, v);
    else
        Lanes::store(static_cast<uint16_t *>(to) + at, Lanes::rounded(v, type), type);
}

INLINE float sum_of(V v) {
    float lanes[width], sum = 0.0f;
    Lanes::store(lanes, v);
    for (int i = 0; i < width; ++i) sum += lanes[i];
    return sum;
}

struct Norm {
    const void *x, *grad;  // grad: null in the forward pass
    const float *weight;
    float *inverse;  // 1 / rms of each row; read where `known`
    void *out;
    int64_t rows, columns;
    float eps;
    bool known, wide_weight;  // wide: 1 + weight in float32, before the rows are rounded
};

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

struct Gate {
    const void *gate, *up, *grad;  // grad: null in the forward pass
    void *out, *to_gate, *to_up;
    int64_t count;
};

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

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

#define OF_TYPE(name, type)                                                  \
    (type == Type::float32    ? name<Type::float32>                          \
     : type == Type::bfloat16 ? name<Type::bfloat16>                         \
                              : name<Type::float16>)

// Columns, and the count of numbers in a gate, are multiples of 16.
EXPORTED(void, norm)(const Norm *given, Type type, int32_t threads) {
    const int64_t each = kPiece / given->columns + 1;
    share_out((given->rows + each - 1) / each, threads,
              given->grad ? OF_TYPE(norm_back, type) : OF_TYPE(norm, type), const_cast<Norm *>(given));
}

EXPORTED(void, gate)(const Gate *given, Type type, int32_t threads) {
    share_out((given->count + kPiece - 1) / kPiece, threads, OF_TYPE(gate, type), const_cast<Gate *>(given));
}
