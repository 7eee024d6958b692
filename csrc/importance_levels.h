// The instruction sets that importance on the CPU is compiled for, and its tile in each.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// Ascending; all that this build has a tile for.
constexpr CpuLevel kImportanceLevels[] = {
    CpuLevel::kPortable,
#ifdef FASTDEAN_X86_LEVELS
    CpuLevel::kAvx2,     CpuLevel::kAvx512, CpuLevel::kAvx512Bf16,
#endif
#ifdef FASTDEAN_AMX_LEVEL
    CpuLevel::kAmxBf16,
#endif
};

// Some examples' tokens in a few neighbouring columns of G or of X.
struct PanelSource {
  const void* data;         // the first of these columns at row 0
  int64_t stride_t;         // between rows, in elements
  int64_t stride_w;         // between columns, in elements
  int64_t columns;          // how many the matrix has; the panel's further ones are 0
  const int64_t* segments;  // [num_examples, 2]: first token and end of each
  int64_t num_examples;
  const int64_t* rows;  // of each token; null: a token is its row

  int64_t offset_of(int64_t token) const {
    return (rows == nullptr ? token : rows[token]) * stride_t;
  }
};

// Writes a panel of `wide` columns, [steps, wide, tokens of a step] unless the level says otherwise.
using Pack = void (*)(const PanelSource& source, int64_t wide, void* panel);

// One way to compute a tile. Panels are aligned to 64 bytes, and so are sums.
struct TileKernel {
  int64_t rows;          // rows of the weight in a tile
  int64_t columns;       // columns of the weight in a tile; a multiple of what 64 bytes hold
  int64_t tokens;        // tokens of one step; an example's last step is padded with 0
  int64_t bytes;         // of one number in a panel
  int64_t chunk_tokens;  // most tokens of a chunk of several examples
  int64_t block_bytes;   // of panels of X that stay in the second-level cache
  Pack pack_g;           // for a panel of `rows` columns of G
  Pack pack_x;           // for a panel of `columns` columns of X
  // Called by a thread before its first tile and after its last.
  void (*enter)();
  void (*leave)();
  // steps[b] of each example in turn; writes total fp32 [rows, columns].
  void (*run)(const void* g_panel, const void* x_panel, const int64_t* steps, int64_t num_examples,
              float* total);
  // Adds the first `height` rows and `width` columns of `total` to `acc`, of column stride 1.
  void (*add)(const float* total, float* acc, int64_t stride_r, int64_t height, int64_t width);
};

constexpr int64_t kMostTileEntries = 32 * 32;

// Defined by the files that are compiled for the level; x86-64 only. `pack` writes panels of fp32,
// or of bf16 in pairs of tokens for the last.
TileKernel avx2_tile(Pack pack);
TileKernel avx512_tile(Pack pack);
TileKernel avx512_bf16_tile(Pack pack);

// Linux only, where a process has to ask for the matrix unit.
TileKernel amx_bf16_tile();
// Whether the processor has it and the system grants it; asks once.
bool amx_bf16_granted();

}  // namespace fastdean
