// What the attention kernels share: what they are given, and how it is cut into blocks.
#pragma once

#include "exponential.h"

namespace pennyweight {

struct Rows {  // [heads, tokens, width of a head], by strides
    float *at;  // or bf16, where the kernel says so
    int64_t head, token;
};

struct Attention {
    Rows query, key, value, out, grad, to_query, to_key, to_value;
    float *sums;  // of each head and token the log-sum-exp of its scores
    const int64_t *boundaries;
    int64_t documents, tokens, heads, shared, width;  // `shared`: query heads to a key head
    float scale;
};

namespace {

constexpr int kRows = Lanes::forward_rows;  // rows that one kernel call computes
constexpr int64_t kQueries = 64, kKeys = 64, kWidest = 256;
constexpr float kUnseen = -1e30f;

// The document that the `block`-th block of queries is of, and where the block begins in it.
INLINE int64_t document_of(const Attention &at, int64_t &block) {
    for (int64_t i = 0;; ++i) {
        const int64_t count = at.boundaries[i + 1] - at.boundaries[i];
        const int64_t blocks = (count + kQueries - 1) / kQueries;
        if (block < blocks) return i;
        block -= blocks;
    }
}

// Blocks of queries of all documents.
INLINE int64_t blocks_of(const Attention &at) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < at.documents; ++i)
        blocks += (at.boundaries[i + 1] - at.boundaries[i] + kQueries - 1) / kQueries;
    return blocks;
}

}  // namespace
}  // namespace pennyweight

// Fills `out` and `sums`; or `to_query`, `to_key` and `to_value`.
EXPORTED(void, attend)(const pennyweight::Attention *given, int32_t threads);
EXPORTED(void, attend_back)(const pennyweight::Attention *given, int32_t threads);
// The same, all rows in bf16 but `to_key` and `to_value`, which are float32.
EXPORTED(void, attend_bf16)(const pennyweight::Attention *given, int32_t threads);
EXPORTED(void, attend_back_bf16)(const pennyweight::Attention *given, int32_t threads);
