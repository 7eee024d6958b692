// The instruction sets that importance on the CPU is compiled for, and how one is taken.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// Ascending; all that this build has a tile for.
constexpr CpuLevel kImportanceLevels[] = {
    CpuLevel::kPortable,
#ifdef FASTDEAN_X86_LEVELS
    CpuLevel::kAvx2,
    CpuLevel::kAvx512,
    CpuLevel::kAvx512Bf16,
#endif
};

// One way to compute a tile.
struct TileKernel {
  int64_t rows;     // rows of the weight in a tile
  int64_t columns;  // columns of the weight in a tile; a multiple of what 64 bytes hold
  int64_t tokens;   // tokens that one step takes; 2: bf16 pairs, interleaved, not fp32
  // g_panel [steps, rows, tokens], x_panel [steps, columns, tokens], both aligned to 64 bytes;
  // steps[b] of each example in turn; adds to total fp32 [rows, columns], aligned likewise.
  void (*run)(const void* g_panel, const void* x_panel, const int64_t* steps, int64_t num_examples,
              float* total);
};

// Defined by the files that are compiled for the level; x86-64 only.
TileKernel avx2_tile();
TileKernel avx512_tile();
TileKernel avx512_bf16_tile();

}  // namespace fastdean
