// The innermost loop of importance on the CPU, once for every instruction set.
//
// A tile is kRows x (kRegisters vectors) entries of the weight. Its inputs are packed token after
// token: kRows values of G, then a row of X. The product of one example grows in registers; at the
// example's end its absolute value is added to `total`, which stays in the first-level cache.
//
// Included by files for different instruction sets, so everything is in an unnamed namespace: the
// linker could take a shared symbol from another file.
#pragma once

#include <cstdint>

#include "importance_levels.h"

namespace fastdean {
namespace {

template <class V>
void run_tile(const void* g_panel, const void* x_panel, const int64_t* steps, int64_t num_examples,
              float* total) {
  using Element = typename V::Element;
  constexpr int kRows = V::kRows;
  constexpr int kRegisters = V::kRegisters;
  constexpr int kColumns = kRegisters * V::kWidth;
  const auto* g = static_cast<const Element*>(g_panel);
  const auto* x = static_cast<const Element*>(x_panel);
  for (int64_t k = 0; k < kRows * kColumns; ++k) total[k] = 0.0f;
  for (int64_t b = 0; b < num_examples; ++b) {
    typename V::Sum part[kRows][kRegisters];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kRegisters; ++j) part[i][j] = V::zero();
    }
    for (int64_t step = 0; step < steps[b]; ++step) {
      typename V::Factor columns[kRegisters];
      for (int j = 0; j < kRegisters; ++j) columns[j] = V::load(x + j * V::kWidth * V::kTokens);
      for (int i = 0; i < kRows; ++i) {
        const auto row = V::broadcast(g + i * V::kTokens);
        for (int j = 0; j < kRegisters; ++j) part[i][j] = V::fma(row, columns[j], part[i][j]);
      }
      g += kRows * V::kTokens;
      x += kColumns * V::kTokens;
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kRegisters; ++j) {
        V::add_absolute(total + i * kColumns + j * V::kWidth, part[i][j]);
      }
    }
  }
}

inline void add_tile(const float* total, float* acc, int64_t stride_r, int64_t height,
                     int64_t width, int64_t columns) {
  for (int64_t i = 0; i < height; ++i) {
    float* row = acc + i * stride_r;
    for (int64_t j = 0; j < width; ++j) row[j] += total[i * columns + j];
  }
}

template <class V>
TileKernel tile_kernel(Pack pack) {
  constexpr int64_t columns = V::kRegisters * V::kWidth;
  static_assert(V::kRows * columns <= kMostTileEntries, "a tile's sums must have room");
  TileKernel kernel{};
  kernel.rows = V::kRows;
  kernel.columns = columns;
  kernel.tokens = V::kTokens;
  kernel.bytes = sizeof(typename V::Element);
  kernel.chunk_tokens = 384;
  // Half of the smallest second-level caches that processors with these levels have.
  kernel.block_bytes = 256 * 1024;
  kernel.pack_g = kernel.pack_x = pack;
  kernel.enter = kernel.leave = [] {};
  kernel.run = &run_tile<V>;
  kernel.add = [](const float* total, float* acc, int64_t stride_r, int64_t height, int64_t width) {
    add_tile(total, acc, stride_r, height, width, columns);
  };
  return kernel;
}

}  // namespace
}  // namespace fastdean
