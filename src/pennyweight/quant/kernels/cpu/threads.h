// Pieces of work shared out over threads.
#pragma once

#include <cstdint>

namespace pennyweight {

// Calls `piece(data, i)` for every i below `pieces`, on up to `threads` threads, and returns when
// all are done. Which thread takes which piece is chance, so pieces write to places of their own.
void share_out(int64_t pieces, int threads, void (*piece)(void *data, int64_t i), void *data);

}  // namespace pennyweight
