// Threads for an operation on the CPU.
#pragma once

#include <cstdint>

namespace fastdean {

// Calls body(context, worker) for worker = 0 .. num_workers - 1, each once, and returns when all
// have returned. The callers must not depend on which of them run at the same time.
void run_workers(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context);

// A part of a computation: step(context, item, worker) for item = 0 .. items - 1, each once.
struct Phase {
  void (*step)(void* context, int64_t item, int64_t worker);
  int64_t items;
};

constexpr int64_t kMaxPhases = 4;

// All items of a phase are done before the next one begins; at most kMaxPhases of them. The workers
// are called together once and wait for each other between phases by looking, since calling them
// again takes longer than the phases of a small problem do. With fewer threads than workers those
// there are do all items.
void run_phases(int64_t num_workers, const Phase* phases, int64_t num_phases, void* context);

// Asks the system to back a large allocation that has not been touched with large pages: the faults
// of 4 KiB pages take longer than all else that is done with fresh memory. Changes no value; without
// effect where the system knows no such thing or the memory is small.
void advise_large_pages(void* start, int64_t bytes);

}  // namespace fastdean
