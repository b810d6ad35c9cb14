// Causal attention of documents in one row, and its gradients (Attention Is All You Need, section
// 3.2.1; recomputed from the log-sum-exp as in FlashAttention, Dao et al. 2022, algorithm 4).
//
// Lanes run along the queries of a block, so that maxima, sums and exponentials need no reduction
// across lanes, and along the head's width where rows are mixed. Keys past a block's last query are
// never looked at. A document's result does not depend on what stands beside it.

#include "across.h"
#include "attention.h"
#include "threads.h"

namespace pennyweight {
namespace {

// A block of queries turned, [width, kQueries], times `factor`; zeros past the last one.
void turn(const float *from, int64_t token, int64_t held, int64_t wide, float factor, float *to) {
    for (int64_t m = 0; m < kQueries; ++m)
        for (int64_t d = 0; d < wide; ++d)
            to[d * kQueries + m] = m < held ? from[m * token + d] * factor : 0.0f;
}

void forward(void *given, int64_t piece) {
    const Attention &at = *static_cast<const Attention *>(given);
    alignas(64) float turned[kWidest * kQueries], scores[kKeys * kQueries], mixed[kQueries * kWidest];
    alignas(64) float top[kQueries], total[kQueries], factor[kQueries];
    const int64_t head = piece % at.heads, wide = at.width;
    int64_t block = piece / at.heads;
    const int64_t document = document_of(at, block), start = at.boundaries[document];
    const int64_t first = start + block * kQueries;
    const int64_t held = least(kQueries, at.boundaries[document + 1] - first), stop = first + held;
    const float *key = at.key.at + head / at.shared * at.key.head;
    const float *value = at.value.at + head / at.shared * at.value.head;
    turn(at.query.at + head * at.query.head + first * at.query.token, at.query.token, held, wide,
         at.scale, turned);
    for (int64_t m = 0; m < kQueries; ++m) top[m] = kUnseen, total[m] = 0.0f;
    for (int64_t n = start; n < stop; n += kKeys) {
        const int64_t keys = least(kKeys, stop - n);
        multiply(keys, kQueries, {key + n * at.key.token, at.key.token, 1}, turned, kQueries, wide,
                 scores, kQueries, true);
        for (int64_t i = 0; i < keys; ++i)  // a query does not see the keys after it
            for (int64_t m = 0; m < least(n + i - first, kQueries); ++m)
                scores[i * kQueries + m] = kUnseen;
        for (int64_t m = 0; m < kQueries; m += width) {
            V most = Lanes::load(top + m);
            for (int64_t i = 0; i < keys; ++i) most = larger(most, Lanes::load(scores + i * kQueries + m));
            const V before = exponential(Lanes::load(top + m) - most);
            V sum = Lanes::load(total + m) * before;
            for (int64_t i = 0; i < keys; ++i) {
                float *score = scores + i * kQueries + m;
                const V power = exponential(Lanes::load(score) - most);
                Lanes::store(score, power);
                sum = sum + power;
            }
            Lanes::store(top + m, most);
            Lanes::store(total + m, sum);
            Lanes::store(factor + m, before);
        }
        if (n > start)
            for (int64_t m = 0; m < held; ++m)
                for (int64_t d = 0; d < wide; d += width) {
                    float *row = mixed + m * wide + d;
                    Lanes::store(row, Lanes::load(row) * Lanes::all(factor[m]));
                }
        multiply(held, wide, {scores, 1, kQueries}, value + n * at.value.token, at.value.token, keys,
                 mixed, wide, n == start);
    }
    float *out = at.out.at + head * at.out.head + first * at.out.token;
    for (int64_t m = 0; m < held; ++m) {
        const V by = Lanes::all(1.0f / total[m]);
        for (int64_t d = 0; d < wide; d += width)
            Lanes::store(out + m * at.out.token + d, Lanes::load(mixed + m * wide + d) * by);
        at.sums[head * at.tokens + first + m] = top[m] + logarithm(total[m]);
    }
}

void backward(void *given, int64_t piece) {
    const Attention &at = *static_cast<const Attention *>(given);
    alignas(64) float turned[kWidest * kQueries], slopes[kWidest * kQueries];
    alignas(64) float powers[kKeys * kQueries], errors[kKeys * kQueries], to_query[kQueries * kWidest];
    alignas(64) float sum[kQueries], along[kQueries];
    const int64_t key_heads = at.heads / at.shared, key_head = piece % key_heads, wide = at.width;
    const int64_t document = piece / key_heads;
    const int64_t start = at.boundaries[document], end = at.boundaries[document + 1];
    const float *key = at.key.at + key_head * at.key.head;
    const float *value = at.value.at + key_head * at.value.head;
    float *to_key = at.to_key.at + key_head * at.to_key.head;
    float *to_value = at.to_value.at + key_head * at.to_value.head;
    for (int64_t n = start; n < end; ++n)
        for (int64_t d = 0; d < wide; ++d)
            to_key[n * at.to_key.token + d] = to_value[n * at.to_value.token + d] = 0.0f;
    for (int64_t head = key_head * at.shared; head < (key_head + 1) * at.shared; ++head)
        for (int64_t first = start; first < end; first += kQueries) {
            const int64_t held = least(kQueries, end - first), stop = first + held;
            const float *query = at.query.at + head * at.query.head + first * at.query.token;
            const float *grad = at.grad.at + head * at.grad.head + first * at.grad.token;
            const float *out = at.out.at + head * at.out.head + first * at.out.token;
            turn(query, at.query.token, held, wide, at.scale, turned);
            turn(grad, at.grad.token, held, wide, 1.0f, slopes);
            for (int64_t m = 0; m < kQueries; ++m) {
                float dot = 0.0f;
                for (int64_t d = 0; m < held && d < wide; ++d)
                    dot += grad[m * at.grad.token + d] * out[m * at.out.token + d];
                along[m] = dot;
                sum[m] = m < held ? at.sums[head * at.tokens + first + m] : 0.0f;
            }
            for (int64_t n = start; n < stop; n += kKeys) {
                const int64_t keys = least(kKeys, stop - n);
                multiply(keys, kQueries, {key + n * at.key.token, at.key.token, 1}, turned, kQueries,
                         wide, powers, kQueries, true);
                multiply(keys, kQueries, {value + n * at.value.token, at.value.token, 1}, slopes,
                         kQueries, wide, errors, kQueries, true);
                for (int64_t m = 0; m < kQueries; m += width) {
                    const V less = Lanes::load(sum + m), by = Lanes::load(along + m);
                    for (int64_t i = 0; i < keys; ++i) {
                        float *power = powers + i * kQueries + m, *error = errors + i * kQueries + m;
                        const V p = exponential(Lanes::load(power) - less);
                        Lanes::store(power, p);
                        Lanes::store(error, p * (Lanes::load(error) - by));
                    }
                }
                for (int64_t i = 0; i < keys; ++i)
                    for (int64_t m = 0; m < least(n + i - first, kQueries); ++m)
                        powers[i * kQueries + m] = errors[i * kQueries + m] = 0.0f;
                multiply(keys, wide, {powers, kQueries, 1}, grad, at.grad.token, held,
                         to_value + n * at.to_value.token, at.to_value.token, false);
                multiply(keys, wide, {errors, kQueries, 1}, query, at.query.token, held,
                         to_key + n * at.to_key.token, at.to_key.token, false);
                multiply(held, wide, {errors, 1, kQueries}, key + n * at.key.token, at.key.token, keys,
                         to_query, wide, n == start);
            }
            float *to = at.to_query.at + head * at.to_query.head + first * at.to_query.token;
            const V by = Lanes::all(at.scale);
            for (int64_t m = 0; m < held; ++m)
                for (int64_t d = 0; d < wide; d += width)
                    Lanes::store(to + m * at.to_query.token + d, Lanes::load(to_query + m * wide + d) * by);
        }
    const V by = Lanes::all(at.scale);
    for (int64_t n = start; n < end; ++n)
        for (int64_t d = 0; d < wide; d += width) {
            float *row = to_key + n * at.to_key.token + d;
            Lanes::store(row, Lanes::load(row) * by);
        }
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

EXPORTED(void, attend)(const Attention *given, int32_t threads) {
    share_out(blocks_of(*given) * given->heads, threads, forward, const_cast<Attention *>(given));
}

EXPORTED(void, attend_back)(const Attention *given, int32_t threads) {
    share_out(given->documents * (given->heads / given->shared), threads, backward,
              const_cast<Attention *>(given));
}
