// From spans of a matrix to candidates: what select_top and select_importance share.
#pragma once

#include <cstdint>

#include "selection_candidates.h"
#include "selection_levels.h"

namespace fastdean {

// The first entry of infinite or NaN importance.
struct Flaw {
  int64_t index = -1;  // flat; -1: there is none
  float importance = 0.0f;
};

// How entries become importance.
struct Importance {
  Scan scan;
  float divisor;
};

// The scan of a level for a weight's DType, or without a weight; null for an unknown DType.
Scan scan_of(CpuLevel level, bool has_weight, int64_t dtype);

// Adds what `count` entries side by side have to `candidates`; the first has the flat index `index`.
// `ascending`: what is taken later has higher indices. An entry of infinite or NaN importance ends
// it: it becomes `flaw` if it comes before that, and the result is false.
bool take_span(const Importance& importance, const float* sums, const void* weight, int64_t count,
               int64_t index, bool ascending, TopCandidates* candidates, Flaw* flaw);

// Joins what workers have collected, each in room for `capacity` at `all` and `sizes` of them, and
// writes the k first: their indices, ascending, and unless it is null their sums. Returns how many.
int64_t join(Candidate* all, int64_t capacity, const int64_t* sizes, int64_t num_workers, int64_t k,
             int64_t* indices, float* sums);

// What a call has found, as the structs of fastdean.h have it.
void write_found(int64_t* found, int64_t count, const Flaw& flaw);

}  // namespace fastdean
