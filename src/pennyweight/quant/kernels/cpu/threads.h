// Pieces of work shared out over threads.
#pragma once

#include <cstdint>

namespace pennyweight {

// Calls `piece(data, i)` for every i below `pieces`, on up to `threads` threads, and returns when
// all are done. Which thread takes which piece is chance, so pieces write to places of their own.
void share_out(int64_t pieces, int threads, void (*piece)(void *data, int64_t i), void *data);

// Work that a thread is worth waking for: products of two numbers, and numbers of an elementwise pass.
constexpr int64_t kProductsAThread = 1 << 18, kNumbersAThread = 1 << 14;

}  // namespace pennyweight
