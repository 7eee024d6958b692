// Threads for an operation on the CPU.
#pragma once

#include <cstdint>

namespace fastdean {

// Calls body(context, worker) for worker = 0 .. num_workers - 1, each once, and returns when all
// have returned. The callers must not depend on which of them run at the same time.
void run_workers(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context);

}  // namespace fastdean
