// A decoder layer each way in one call: y = h + down(silu(gate n) * up n), where n = norm h and
// h = x + o(attention(q m, k m, v m)), m = norm x. The kernels of its parts go one after the other over
// two pieces of memory that are cut here: what backward reads, and what nobody reads after the call. To
// the bit it is what the parts compute one by one. Rows are float32, frozen weights are stored ones.

#include "adapted.h"
#include "attention.h"
#include "elementwise.h"
#include "threads.h"

namespace pennyweight {
namespace {

constexpr int kQ = 0, kK = 1, kV = 2, kO = 3, kGate = 4, kUp = 5, kDown = 6, kLayers = 7;

struct FrozenNorm {
    const float *weight;
    float eps;
    bool wide_weight;
};

// What a layer is, whatever passes through it: places for what is made are null.
struct DecoderLayer {
    Adapted layers[kLayers];
    FrozenNorm norms[2];  // before attention, and before the feed-forward
    int64_t head_width;
    float scaling;
    bool trained[kLayers][2];  // A and B

    int64_t width() const { return layers[kQ].weight->columns; }
    int64_t queries() const { return layers[kQ].weight->rows; }
    int64_t keys() const { return layers[kK].weight->rows; }
    int64_t inside() const { return layers[kGate].weight->rows; }
};

struct Pass {
    const float *x, *cos, *sin;  // [tokens, width], and the angles [tokens, head_width]
    const int64_t *boundaries;
    int64_t documents, tokens;
    uintptr_t kept, spare;  // memory, as many bytes of each as `bytes` says
    float *y;
    const float *grad;   // of y, in backward
    float *to_x;         // null: nobody asks for it
    float *to_masters;  // of each layer's A and B, as far as they are trained
    int32_t threads;
};

// Memory that is cut into pieces.
struct Memory {
    uintptr_t at;

    float *cut(int64_t count) {
        auto *piece = reinterpret_cast<float *>(at);
        at += static_cast<uintptr_t>(count) * sizeof(float);
        return piece;
    }
};

// What backward reads, beside x.
struct Kept {
    float *query, *key, *value, *mixed, *between, *gate, *up, *z[kLayers];
    float *sums, *inverse[2];  // of attention, and of norms

    Kept(const DecoderLayer &of, int64_t tokens, Memory &from) {
        query = from.cut(tokens * of.queries());
        key = from.cut(tokens * of.keys());
        value = from.cut(tokens * of.keys());
        mixed = from.cut(tokens * of.queries());
        between = from.cut(tokens * of.width());
        gate = from.cut(tokens * of.inside());
        up = from.cut(tokens * of.inside());
        for (int i = 0; i < kLayers; ++i) z[i] = from.cut(tokens * of.layers[i].rank);
        // Last, since they are not of whole vectors.
        sums = from.cut(tokens * (of.queries() / of.head_width));
        for (float *&each : inverse) each = from.cut(tokens);
    }
};

struct ForwardSpare {
    float *read, *inside;

    ForwardSpare(const DecoderLayer &of, int64_t tokens, Memory &from) {
        read = from.cut(tokens * of.width());
        inside = from.cut(tokens * of.inside());
    }
};

struct BackwardSpare {
    float *grad, *read, *of_read, *other, *dz[kLayers];
    float *inside, *of_inside, *of_gate;               // in the feed-forward; in their place afterwards
    float *of_mixed, *of_query, *of_key, *of_value;    // in attention

    BackwardSpare(const DecoderLayer &of, int64_t tokens, Memory &from) {
        const int64_t width = tokens * of.width(), inside_width = tokens * of.inside();
        grad = from.cut(width), read = from.cut(width), of_read = from.cut(width), other = from.cut(width);
        for (int i = 0; i < kLayers; ++i) dz[i] = from.cut(tokens * of.layers[i].rank);
        Memory again = from;
        inside = from.cut(inside_width), of_inside = from.cut(inside_width), of_gate = from.cut(inside_width);
        of_mixed = again.cut(tokens * of.queries()), of_query = again.cut(tokens * of.queries());
        of_key = again.cut(tokens * of.keys()), of_value = again.cut(tokens * of.keys());
        if (again.at > from.at) from = again;
    }
};

struct Sum {
    const float *from;
    float *to;
    int64_t count;
};

// to += from.
void sum(void *given, int64_t piece) {
    const Sum &s = *static_cast<const Sum *>(given);
    const int64_t stop = least((piece + 1) * kNumbersAThread, s.count);
    for (int64_t at = piece * kNumbersAThread; at < stop; at += width)
        Lanes::store(s.to + at, Lanes::load(s.to + at) + Lanes::load(s.from + at));
}

// The parts, over one pass.
struct Parts {
    const DecoderLayer &of;
    const Pass &pass;
    const Kept kept;

    // Threads that so much work is worth.
    int threads(int64_t work, int64_t a_thread) const {
        return static_cast<int>(work / a_thread < 1 ? 1 : least(work / a_thread, pass.threads));
    }

    void add(const float *from, float *to, int64_t count) const {
        Sum s{from, to, count};
        share_out((count + kNumbersAThread - 1) / kNumbersAThread, threads(count, kNumbersAThread), sum, &s);
    }

    // Rows weighed; or with their gradient that of x.
    void norm(int i, const float *x, const float *grad, bool known, float *out) const {
        const FrozenNorm &n = of.norms[i];
        const Norm given{x, grad, n.weight, kept.inverse[i], out, pass.tokens, of.width(), n.eps, known, n.wide_weight};
        KERNEL(norm)(&given, Type::float32, threads(pass.tokens * of.width(), kNumbersAThread));
    }

    // The layers of one call and what they give, or the gradient of that; returns the work it is.
    int64_t gather(int first, int count, float *const *y, Adapted *layers) const {
        int64_t work = 0;
        for (int i = 0; i < count; ++i) {
            layers[i] = of.layers[first + i];
            layers[i].z = kept.z[first + i], layers[i].y = y[i];
            work += pass.tokens * layers[i].weight->columns * layers[i].weight->rows;
        }
        return work;
    }

    void products(int first, int count, const float *x, float *const *y) const {
        Adapted layers[3];
        const int64_t work = gather(first, count, y, layers);
        KERNEL(adapted)(layers, count, x, pass.tokens, threads(work, kProductsAThread));
    }

    void gradients(int first, int count, float *const *grads, const float *x, float *const *dz, float *(*to)[2],
                   float *to_x, float *other) const {
        Adapted layers[3];
        const int64_t work = gather(first, count, grads, layers);
        for (int i = 0; i < count; ++i)
            layers[i].dz = dz[first + i], layers[i].to_a = to[first + i][0], layers[i].to_b = to[first + i][1];
        KERNEL(adapted_back)(layers, count, x, pass.tokens, to_x, other, threads(work, kProductsAThread));
    }

    void rotate(float *query, float *key, bool back) const {
        const int64_t wide = of.head_width, tall = pass.tokens;
        const auto heads = [&](float *at, int64_t row) {
            return Heads{at, at, row / wide, wide, row, wide, row};
        };
        const Rotation given{{heads(query, of.queries()), heads(key, of.keys())}, pass.cos, pass.sin, tall, wide, back};
        KERNEL(rotate)(&given, Type::float32, threads(tall * of.queries(), kNumbersAThread));
    }

    Rows rows(float *at, int64_t row) const { return {at, of.head_width, row}; }

    Attention attention() const {
        Attention a{};
        a.query = rows(kept.query, of.queries()), a.key = rows(kept.key, of.keys());
        a.value = rows(kept.value, of.keys()), a.out = rows(kept.mixed, of.queries());
        a.sums = kept.sums, a.boundaries = pass.boundaries, a.documents = pass.documents;
        a.tokens = pass.tokens, a.heads = of.queries() / of.head_width, a.shared = of.queries() / of.keys();
        a.width = of.head_width, a.scale = of.scaling;
        return a;
    }

    int attention_threads() const {
        int64_t work = 0;
        for (int64_t i = 0; i < pass.documents; ++i) {
            const int64_t count = pass.boundaries[i + 1] - pass.boundaries[i];
            work += count * count * of.queries();
        }
        return threads(work, kProductsAThread);
    }
};

void forward(const DecoderLayer &of, const Pass &pass) {
    Memory held{pass.kept}, loose{pass.spare};
    const Parts parts{of, pass, Kept(of, pass.tokens, held)};
    const Kept &kept = parts.kept;
    const ForwardSpare spare(of, pass.tokens, loose);
    const int64_t numbers = pass.tokens * of.width(), inside = pass.tokens * of.inside();
    float *const first[] = {kept.query, kept.key, kept.value}, *const second[] = {kept.gate, kept.up};
    parts.norm(0, pass.x, nullptr, false, spare.read);
    parts.products(kQ, 3, spare.read, first);
    parts.rotate(kept.query, kept.key, false);
    const Attention attention = parts.attention();
    KERNEL(attend)(&attention, parts.attention_threads());
    parts.products(kO, 1, kept.mixed, &kept.between);
    parts.add(pass.x, kept.between, numbers);
    parts.norm(1, kept.between, nullptr, false, spare.read);
    parts.products(kGate, 2, spare.read, second);
    const Gate gate{kept.gate, kept.up, nullptr, spare.inside, nullptr, nullptr, inside};
    KERNEL(gate)(&gate, Type::float32, parts.threads(inside, kNumbersAThread));
    parts.products(kDown, 1, spare.inside, &pass.y);
    parts.add(kept.between, pass.y, numbers);
}

void backward(const DecoderLayer &of, const Pass &pass) {
    Memory held{pass.kept}, loose{pass.spare};
    const Parts parts{of, pass, Kept(of, pass.tokens, held)};
    const Kept &kept = parts.kept;
    const BackwardSpare spare(of, pass.tokens, loose);
    const int64_t numbers = pass.tokens * of.width(), inside = pass.tokens * of.inside();
    float *to[kLayers][2], *next = pass.to_masters;
    for (int i = 0; i < kLayers; ++i)
        for (int b = 0; b < 2; ++b) {
            const Weight &weight = *of.layers[i].weight;
            to[i][b] = of.trained[i][b] ? next : nullptr;
            if (of.trained[i][b]) next += of.layers[i].rank * (b ? weight.rows : weight.columns);
        }
    // The feed-forward.
    Gate gate{kept.gate, kept.up, nullptr, spare.inside, nullptr, nullptr, inside};
    const int gate_threads = parts.threads(inside, kNumbersAThread);
    KERNEL(gate)(&gate, Type::float32, gate_threads);
    auto *const grad_y = const_cast<float *>(pass.grad);
    parts.gradients(kDown, 1, &grad_y, spare.inside, spare.dz, to, spare.of_inside, nullptr);
    gate.grad = spare.of_inside, gate.to_gate = spare.of_gate, gate.to_up = spare.inside;
    KERNEL(gate)(&gate, Type::float32, gate_threads);
    parts.norm(1, kept.between, nullptr, true, spare.read);
    float *const second[] = {spare.of_gate, spare.inside};
    parts.gradients(kGate, 2, second, spare.read, spare.dz, to, spare.of_read, spare.other);
    parts.norm(1, kept.between, spare.of_read, true, spare.grad);
    parts.add(pass.grad, spare.grad, numbers);
    // Attention.
    parts.gradients(kO, 1, &spare.grad, kept.mixed, spare.dz, to, spare.of_mixed, nullptr);
    Attention attention = parts.attention();
    attention.grad = parts.rows(spare.of_mixed, of.queries());
    attention.to_query = parts.rows(spare.of_query, of.queries());
    attention.to_key = parts.rows(spare.of_key, of.keys());
    attention.to_value = parts.rows(spare.of_value, of.keys());
    KERNEL(attend_back)(&attention, parts.attention_threads());
    parts.rotate(spare.of_query, spare.of_key, true);
    parts.norm(0, pass.x, nullptr, true, spare.read);
    float *const first[] = {spare.of_query, spare.of_key, spare.of_value};
    parts.gradients(kQ, 3, first, spare.read, spare.dz, to, pass.to_x ? spare.of_read : nullptr, spare.other);
    if (!pass.to_x) return;
    parts.norm(0, pass.x, spare.of_read, true, pass.to_x);
    parts.add(spare.grad, pass.to_x, numbers);
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

// Of memory: what is kept, and what forward and backward need meanwhile.
EXPORTED(void, decoder_layer_bytes)(const DecoderLayer *of, int64_t tokens, int64_t *bytes) {
    Memory kept{0}, forward{0}, backward{0};
    Kept(*of, tokens, kept), ForwardSpare(*of, tokens, forward), BackwardSpare(*of, tokens, backward);
    bytes[0] = static_cast<int64_t>(kept.at), bytes[1] = static_cast<int64_t>(forward.at);
    bytes[2] = static_cast<int64_t>(backward.at);
}

EXPORTED(void, decoder_layer)(const DecoderLayer *of, const Pass *pass) { forward(*of, *pass); }

EXPORTED(void, decoder_layer_back)(const DecoderLayer *of, const Pass *pass) { backward(*of, *pass); }
