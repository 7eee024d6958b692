// Threads for an operation on the CPU.
#pragma once

#include <cstdint>

namespace fastdean {

// Calls body(context, worker) once for each worker = 0 .. num_workers - 1, and returns when all have
// returned. Workers need not run at the same time.
void run_workers(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context);

// A part of a computation: step(context, item, worker) once for each item = 0 .. items - 1.
struct Phase {
  void (*step)(void* context, int64_t item, int64_t worker);
  int64_t items;
};

constexpr int64_t kMaxPhases = 4;

// Runs at most kMaxPhases phases, all items of one before the next begins. The workers start once and
// spin between phases, because starting them again takes longer than a small problem's phases. If
// there are fewer threads than workers, these do all items.
void run_phases(int64_t num_workers, const Phase* phases, int64_t num_phases, void* context);

// Asks the system for large pages for a large allocation not touched yet: faults of 4 KiB pages take
// longer than all other work on fresh memory. Changes no value; does nothing for small memory or where
// the system has no large pages.
void advise_large_pages(void* start, int64_t bytes);

}  // namespace fastdean
