// Products of float32 rows with stored weights that take adapters along. The weight's part is that of
// product.cpp; an adapter's are narrow products, cut so that what they read again stands in the
// first-level cache. What is computed for a row does not depend on how many rows stand beside it.

#include "adapted.h"

#include "across.h"
#include "product.h"
#include "threads.h"

namespace pennyweight {
namespace {

constexpr int64_t kBlock = 24;     // rows of one piece of work
constexpr int64_t kStrip = 64;     // columns of one piece of work
constexpr int64_t kMostRank = 256;
constexpr int64_t kTogether = 256;  // terms of a sum that is added to the others'

float *floats(void *at) { return static_cast<float *>(at); }

struct Work {
    const Adapted *layers;
    int64_t count;
    const float *x;
    int64_t rows;
    float *to_x, *from;  // from: what another layer gives x
};

// out[m, j..j+4] = x[m, :] . factor[j..j+4, :], for `rows` rows.
template <int rows>
void dots(const float *x, int64_t inputs, const float *factor, float *out, int64_t rank) {
    V sum[rows][4];
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 4; ++n) sum[m][n] = Lanes::zero();
    for (int64_t k = 0; k < inputs; k += width) {
        V wide[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) wide[n] = Lanes::load(factor + n * inputs + k);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
            const V one = Lanes::load(x + m * inputs + k);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sum[m][n] = Lanes::fused(one, wide[n], sum[m][n]);
        }
    }
    for (int m = 0; m < rows; ++m) Lanes::sums(out + m * rank, sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
}

// z of a block of rows.
void narrow(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    const Adapted &of = w.layers[piece % w.count];
    const int64_t inputs = of.weight->columns, first = piece / w.count * kBlock;
    const int64_t stop = least(first + kBlock, w.rows);
    for (int64_t j = 0; j < of.rank; j += 4)
        for (int64_t m = first; m < stop;) {
            const float *x = w.x + m * inputs, *a = of.a + j * inputs;
            float *z = floats(of.z) + m * of.rank + j;
            if (stop - m >= 3)
                dots<3>(x, inputs, a, z, of.rank), m += 3;
            else
                dots<1>(x, inputs, a, z, of.rank), m += 1;
        }
}

// The layer whose strip of outputs the `piece`-th is, and the strip.
const Adapted &strip_of(const Work &w, int64_t &piece) {
    for (const Adapted *of = w.layers;; ++of) {
        const int64_t strips = (of->weight->rows + kStrip - 1) / kStrip;
        if (piece < strips) return *of;
        piece -= strips;
    }
}

// y += scaling z B^T, for a strip of outputs.
void widen(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    const Adapted &of = strip_of(w, piece);
    if (!of.rank) return;
    alignas(64) float turned[kMostRank * kStrip];
    const int64_t outputs = of.weight->rows, first = piece * kStrip, held = least(kStrip, outputs - first);
    for (int64_t n = 0; n < held; ++n)
        for (int64_t j = 0; j < of.rank; ++j) turned[j * kStrip + n] = of.scaling * of.b[(first + n) * of.rank + j];
    multiply(w.rows, held, {floats(of.z), of.rank, 1}, turned, kStrip, of.rank, floats(of.y) + first, outputs,
             false);
}

// dz of a block of rows.
void narrow_back(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    const Adapted &of = w.layers[piece % w.count];
    if (!of.rank) return;
    const int64_t outputs = of.weight->rows, first = piece / w.count * kBlock;
    const int64_t held = least(kBlock, w.rows - first);
    float *to = floats(of.dz) + first * of.rank;
    multiply(held, of.rank, {floats(of.y) + first * outputs, outputs, 1}, of.b, of.rank, outputs, to, of.rank, true);
    for (int64_t i = 0; i < held * of.rank; ++i) to[i] *= of.scaling;
}

// to_x += from + dz A of one layer, for a strip of its columns.
void widen_back(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    const Adapted &of = *w.layers;
    const int64_t inputs = of.weight->columns, first = piece * kStrip, held = least(kStrip, inputs - first);
    for (int64_t m = 0; m < w.rows && w.from; ++m)
        for (int64_t k = first; k < first + held; k += width) {
            float *to = w.to_x + m * inputs + k;
            Lanes::store(to, Lanes::load(to) + Lanes::load(w.from + m * inputs + k));
        }
    if (!of.rank) return;
    alignas(64) float strip[kMostRank * kStrip];
    for (int64_t j = 0; j < of.rank; ++j)
        memcpy(strip + j * kStrip, of.a + j * inputs + first, static_cast<size_t>(held) * sizeof(float));
    multiply(w.rows, held, {floats(of.dz), of.rank, 1}, strip, kStrip, of.rank, w.to_x + first, inputs, false);
}

// to[tall, wide] = scaling times the sum over rows of left[row, :tall] and right[row, :wide].
void outer(int64_t rows, const float *left, int64_t left_row, int64_t tall, const float *right, int64_t right_row,
           int64_t wide, float scaling, float *to, int64_t to_row) {
    alignas(64) float sums[kMostRank * kStrip];
    for (int64_t m = 0; m < rows; m += kTogether) {
        multiply(tall, wide, {left + m * left_row, 1, left_row}, right + m * right_row, right_row,
                 least(kTogether, rows - m), sums, wide, true);
        const V by = Lanes::all(scaling);
        for (int64_t i = 0; i < tall; ++i)
            for (int64_t k = 0; k < wide; k += width) {
                const V sum = Lanes::load(sums + i * wide + k) * by;
                float *place = to + i * to_row + k;
                Lanes::store(place, m ? Lanes::load(place) + sum : sum);
            }
    }
}

// A strip of to_a, or of to_b after those.
void gradient(void *given, int64_t piece) {
    const Work &w = *static_cast<const Work *>(given);
    const int64_t inputs = w.layers->weight->columns, strips = (inputs + kStrip - 1) / kStrip;
    if (piece < strips * w.count) {
        const Adapted &of = w.layers[piece / strips];
        const int64_t first = piece % strips * kStrip;
        if (of.to_a)
            outer(w.rows, floats(of.dz), of.rank, of.rank, w.x + first, inputs, least(kStrip, inputs - first), 1.0f,
                  of.to_a + first, inputs);
        return;
    }
    piece -= strips * w.count;
    const Adapted &of = strip_of(w, piece);
    const int64_t outputs = of.weight->rows, first = piece * kStrip;
    if (of.to_b)
        outer(w.rows, floats(of.y) + first, outputs, least(kStrip, outputs - first), floats(of.z), of.rank, of.rank,
              of.scaling, of.to_b + first * of.rank, of.rank);
}

int64_t blocks(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// Strips of the outputs of all layers.
int64_t strips_of(const Work &w) {
    int64_t strips = 0;
    for (const Adapted *of = w.layers; of < w.layers + w.count; ++of)
        strips += (of->weight->rows + kStrip - 1) / kStrip;
    return strips;
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

EXPORTED(void, adapted)(const Adapted *layers, int64_t count, const float *x, int64_t rows, int32_t threads) {
    Work w{layers, count, x, rows, nullptr, nullptr};
    share_out(blocks(rows) * count, threads, narrow, &w);
    if (!layers->y) return;
    for (const Adapted *of = layers; of < layers + count; ++of)
        KERNEL(forward)(of->weight, x, rows, of->bias, floats(of->y), threads);
    share_out(strips_of(w), threads, widen, &w);
}

EXPORTED(void, adapted_back)(const Adapted *layers, int64_t count, const float *x, int64_t rows, float *to_x,
                             float *spare, int32_t threads) {
    Work all{layers, count, x, rows, nullptr, nullptr};
    share_out(blocks(rows) * count, threads, narrow_back, &all);
    const int64_t strips = (layers->weight->columns + kStrip - 1) / kStrip;
    for (const Adapted *of = layers; to_x && of < layers + count; ++of) {
        Work w{of, 1, x, rows, to_x, of > layers ? spare : nullptr};
        KERNEL(backward)(of->weight, floats(of->y), rows, of > layers ? spare : to_x, threads);
        share_out(strips, threads, widen_back, &w);
    }
    share_out(strips * count + strips_of(all), threads, gradient, &all);
}
