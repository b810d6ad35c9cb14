// Threads are those of the OpenMP runtime that torch has loaded: a second pool would compete with
// its workers, which spin for a while after each product. Where there is none, or in a process
// forked from one that had it (whose workers did not survive), threads are made for each call.

#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

namespace pennyweight {
namespace {

using Runtime = void (*)(void (*)(void *), void *, unsigned, unsigned);

constexpr int kMostThreads = 256;

Runtime runtime = nullptr;
bool looked_up = false;
bool forked = false;

void mark_forked() { forked = true; }

Runtime openmp() {
    if (!looked_up) {
        runtime = reinterpret_cast<Runtime>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        pthread_atfork(nullptr, nullptr, mark_forked);
        looked_up = true;
    }
    return forked ? nullptr : runtime;
}

struct Shared {
    void (*piece)(void *, int64_t);
    void *data;
    int64_t pieces;
    int64_t next;
};

void work(void *given) {
    auto *shared = static_cast<Shared *>(given);
    for (;;) {
        const int64_t i = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
        if (i >= shared->pieces) return;
        shared->piece(shared->data, i);
    }
}

void *work_on_thread(void *given) {
    work(given);
    return nullptr;
}

}  // namespace

void share_out(int64_t pieces, int threads, void (*piece)(void *, int64_t), void *data) {
    Shared shared{piece, data, pieces, 0};
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads <= 1) return work(&shared);
    if (Runtime run = openmp()) return run(work, &shared, static_cast<unsigned>(threads), 0);
    pthread_t made[kMostThreads];
    int count = 0;
    while (count < threads - 1 && pthread_create(&made[count], nullptr, work_on_thread, &shared) == 0)
        ++count;
    work(&shared);
    for (int i = 0; i < count; ++i) pthread_join(made[i], nullptr);
}

}  // namespace pennyweight
