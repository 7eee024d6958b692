// How examples are cut for the tiles of importance on the CPU: what accumulate_importance and
// select_importance share. Both add in this order, so that their sums are the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "fastdean.h"
#include "importance_levels.h"

namespace fastdean {

constexpr int64_t kPanelAlignment = 64;

// The bf16 instructions serve bf16 inputs alone.
TileKernel kernel_of(CpuLevel level, DType dtype);

// Some whole examples.
struct Chunk {
  int64_t first;   // number of its first example
  int64_t count;   // how many examples
  int64_t tokens;  // of all of them
  int64_t steps;   // of all of them, in steps of the level
};

// `segments`: int64 [num_segments, 2], first token and end of each example.
std::vector<Chunk> chunks_of(const int64_t* segments, int64_t num_segments,
                             const TileKernel& kernel);

// In steps of the level, of each example of a chunk.
std::vector<int64_t> steps_of(const int64_t* segments, const Chunk& chunk,
                              const TileKernel& kernel);

// Whether every segment lies in 0 .. tokens.
bool segments_fit(const int64_t* segments, int64_t num_segments, int64_t tokens);

}  // namespace fastdean
