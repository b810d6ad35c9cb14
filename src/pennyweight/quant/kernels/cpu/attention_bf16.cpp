// The attention of attention.cpp on rows in bf16, by products of pairs of bf16 with float32 sums.
// Powers and their errors are rounded to bf16 before they are multiplied, as in FlashAttention; maxima,
// sums and what is summed over blocks stay in float32.

#include "attention.h"
#include "pairs.h"
#include "threads.h"

#if defined(__AVX512BF16__)

namespace pennyweight {
namespace {

struct Halves {  // rows of one head, in bf16
    uint16_t *at;
    int64_t token;

    Halves(const Rows &of, int64_t head, int64_t first)
        : at(reinterpret_cast<uint16_t *>(of.at) + head * of.head + first * of.token), token(of.token) {}

    // Each row in pairs of what follows each other in it; strides are even.
    Pairs pairs() const { return {reinterpret_cast<const uint32_t *>(at), token / 2, 1}; }
};

// A block of rows turned, [width / 2, kQueries] pairs; zeros past the last one.
void turn(Halves from, int64_t held, int64_t wide, uint32_t *to) {
    const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(2 * from.token)));
    for (int64_t m = 0; m < kQueries; m += width) {
        const int64_t left = held - m;
        const __mmask16 here = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
        for (int64_t d = 0; d < wide; d += 2) {
            const I found = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), here, apart,
                                                        from.at + m * from.token + d, 1);
            _mm512_store_si512(to + d / 2 * kQueries + m, found);
        }
    }
}

void forward(void *given, int64_t piece) {
    const Attention &at = *static_cast<const Attention *>(given);
    alignas(64) uint32_t turned[kWidest / 2 * kQueries], powers[kKeys / 2 * kQueries];
    alignas(64) uint32_t values[kKeys / 2 * kWidest];
    alignas(64) float scores[(kKeys + 1) * kQueries], mixed[kQueries * kWidest];
    alignas(64) float top[kQueries], total[kQueries], factor[kQueries];
    const int64_t head = piece % at.heads, wide = at.width;
    int64_t block = piece / at.heads;
    const int64_t document = document_of(at, block), start = at.boundaries[document];
    const int64_t first = start + block * kQueries;
    const int64_t held = least(kQueries, at.boundaries[document + 1] - first), stop = first + held;
    const V scale = Lanes::all(at.scale);
    turn({at.query, head, first}, held, wide, turned);
    for (int64_t m = 0; m < kQueries; ++m) top[m] = kUnseen, total[m] = 0.0f;
    for (int64_t n = start; n < stop; n += kKeys) {
        const int64_t keys = least(kKeys, stop - n);
        multiply(keys, kQueries, Halves{at.key, head / at.shared, n}.pairs(), turned, kQueries, wide / 2,
                 scores, kQueries, true);
        for (int64_t i = 0; i < keys; ++i)  // a query does not see the keys after it
            for (int64_t m = 0; m < least(n + i - first, kQueries); ++m)
                scores[i * kQueries + m] = kUnseen / at.scale;
        for (int64_t m = 0; m < kQueries; m += width) {
            V most = Lanes::load(scores + m);
            for (int64_t i = 1; i < keys; ++i) most = larger(most, Lanes::load(scores + i * kQueries + m));
            most = larger(Lanes::load(top + m), most * scale);
            const V before = exponential(Lanes::load(top + m) - most);
            V sum = Lanes::load(total + m) * before;
            for (int64_t i = 0; i < keys; i += 2) {
                const float *score = scores + i * kQueries + m;
                const V one = exponential(Lanes::load(score) * scale - most);
                const V two = i + 1 < keys ? exponential(Lanes::load(score + kQueries) * scale - most)
                                           : Lanes::zero();
                _mm512_store_si512(powers + i / 2 * kQueries + m, paired(one, two));
                sum = sum + one + two;
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
        const Halves value{at.value, head / at.shared, n};
        pair_rows(value.at, value.token, keys, wide, values);
        multiply(held, wide, {powers, 1, kQueries}, values, wide, (keys + 1) / 2, mixed, wide, n == start);
    }
    const Halves out{at.out, head, first};
    for (int64_t m = 0; m < held; ++m) {
        const V by = Lanes::all(1.0f / total[m]);
        for (int64_t d = 0; d < wide; d += width)
            narrow(out.at + m * out.token + d, Lanes::load(mixed + m * wide + d) * by);
        at.sums[head * at.tokens + first + m] = top[m] + logarithm(total[m]);
    }
}

void backward(void *given, int64_t piece) {
    const Attention &at = *static_cast<const Attention *>(given);
    alignas(64) uint32_t turned[kWidest / 2 * kQueries], slopes[kWidest / 2 * kQueries];
    alignas(64) uint32_t queries[kQueries / 2 * kWidest], grads[kQueries / 2 * kWidest];
    alignas(64) uint32_t keys_paired[kKeys / 2 * kWidest], by_query[kKeys / 2 * kQueries];
    alignas(64) uint16_t powers[kKeys * kQueries], errors[kKeys * kQueries];
    alignas(64) float scores[kKeys * kQueries], steep[kKeys * kQueries], to_query[kQueries * kWidest];
    alignas(64) float sum[kQueries], along[kQueries];
    const int64_t key_heads = at.heads / at.shared, key_head = piece % key_heads, wide = at.width;
    const int64_t document = piece / key_heads;
    const int64_t start = at.boundaries[document], end = at.boundaries[document + 1];
    float *to_key = at.to_key.at + key_head * at.to_key.head;
    float *to_value = at.to_value.at + key_head * at.to_value.head;
    const V scale = Lanes::all(at.scale);
    for (int64_t n = start; n < end; ++n)
        for (int64_t d = 0; d < wide; ++d)
            to_key[n * at.to_key.token + d] = to_value[n * at.to_value.token + d] = 0.0f;
    for (int64_t head = key_head * at.shared; head < (key_head + 1) * at.shared; ++head)
        for (int64_t first = start; first < end; first += kQueries) {
            const int64_t held = least(kQueries, end - first), stop = first + held;
            const Halves query{at.query, head, first}, grad{at.grad, head, first}, out{at.out, head, first};
            turn(query, held, wide, turned);
            turn(grad, held, wide, slopes);
            pair_rows(query.at, query.token, held, wide, queries);
            pair_rows(grad.at, grad.token, held, wide, grads);
            for (int64_t m = 0; m < kQueries; ++m) {
                V dot = Lanes::zero();
                for (int64_t d = 0; m < held && d < wide; d += width)
                    dot = Lanes::fused(wide_of(grad.at + m * grad.token + d),
                                       wide_of(out.at + m * out.token + d), dot);
                along[m] = _mm512_reduce_add_ps(dot);
                sum[m] = m < held ? at.sums[head * at.tokens + first + m] : 0.0f;
            }
            for (int64_t n = start; n < stop; n += kKeys) {
                const int64_t keys = least(kKeys, stop - n);
                const Halves key{at.key, key_head, n}, value{at.value, key_head, n};
                multiply(keys, kQueries, key.pairs(), turned, kQueries, wide / 2, scores, kQueries, true);
                multiply(keys, kQueries, value.pairs(), slopes, kQueries, wide / 2, steep, kQueries, true);
                for (int64_t m = 0; m < kQueries; m += width) {
                    const V less = Lanes::load(sum + m), by = Lanes::load(along + m);
                    const I queries_here = _mm512_add_epi32(
                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        _mm512_set1_epi32(static_cast<int>(first + m)));
                    V before = Lanes::zero();
                    for (int64_t i = 0; i < keys; ++i) {
                        const __mmask16 seen = _mm512_cmpge_epi32_mask(
                            queries_here, _mm512_set1_epi32(static_cast<int>(n + i)));
                        const int64_t place = i * kQueries + m;
                        const V power = _mm512_maskz_mov_ps(
                            seen, exponential(Lanes::load(scores + place) * scale - less));
                        const V error = power * (Lanes::load(steep + place) - by);
                        narrow(powers + place, power);
                        narrow(errors + place, error);
                        if (i % 2 == 1 || i + 1 == keys)
                            _mm512_store_si512(by_query + i / 2 * kQueries + m,
                                               i % 2 ? paired(before, error) : paired(error, Lanes::zero()));
                        before = error;
                    }
                }
                pair_rows(key.at, key.token, keys, wide, keys_paired);
                const auto *of_powers = reinterpret_cast<const uint32_t *>(powers);
                const auto *of_errors = reinterpret_cast<const uint32_t *>(errors);
                multiply(keys, wide, {of_powers, kQueries / 2, 1}, grads, wide, (held + 1) / 2,
                         to_value + n * at.to_value.token, at.to_value.token, false);
                multiply(keys, wide, {of_errors, kQueries / 2, 1}, queries, wide, (held + 1) / 2,
                         to_key + n * at.to_key.token, at.to_key.token, false);
                multiply(held, wide, {by_query, 1, kQueries}, keys_paired, wide, (keys + 1) / 2, to_query,
                         wide, n == start);
            }
            const Halves to{at.to_query, head, first};
            for (int64_t m = 0; m < held; ++m)
                for (int64_t d = 0; d < wide; d += width)
                    narrow(to.at + m * to.token + d, Lanes::load(to_query + m * wide + d) * scale);
        }
    for (int64_t n = start; n < end; ++n)
        for (int64_t d = 0; d < wide; d += width) {
            float *row = to_key + n * at.to_key.token + d;
            Lanes::store(row, Lanes::load(row) * scale);
        }
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

EXPORTED(void, attend_bf16)(const Attention *given, int32_t threads) {
    share_out(blocks_of(*given) * given->heads, threads, forward, const_cast<Attention *>(given));
}

EXPORTED(void, attend_back_bf16)(const Attention *given, int32_t threads) {
    share_out(given->documents * (given->heads / given->shared), threads, backward,
              const_cast<Attention *>(given));
}

#endif
