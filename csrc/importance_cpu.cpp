// accumulate_importance on the CPU.
//
// Whole examples are joined into chunks. A chunk's G and X are packed once, into panels of a tile's
// rows and columns that all workers read. A worker goes through a block of panels of X for one panel
// of G: the panel of G stays in the first-level cache, the block of X in the second, the tile's sums
// in registers, and the accumulator is read and written once per chunk, along its rows. One worker
// computes each tile in one order: the number of workers does not change the result.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "fastdean.h"
#include "floats.h"
#include "importance_chunks.h"
#include "importance_levels.h"
#include "importance_tile.h"
#include "parallel.h"

namespace fastdean {
namespace {

constexpr int64_t kAlignment = kPanelAlignment;
// Enough for workers of unequal speed to finish together.
constexpr int64_t kItemsPerWorker = 8;

struct Portable {
  using Element = float;
  struct Sum {
    float lanes[8];
  };
  using Factor = Sum;
  static constexpr int kRows = 4, kRegisters = 2, kWidth = 8, kTokens = 1;
  static Sum zero() { return {}; }
  static Factor load(const float* x) {
    Factor result;
    std::memcpy(result.lanes, x, sizeof result.lanes);
    return result;
  }
  static Factor broadcast(const float* g) {
    Factor result;
    for (float& lane : result.lanes) lane = *g;
    return result;
  }
  static Sum fma(const Factor& a, const Factor& b, Sum c) {
    for (int i = 0; i < kWidth; ++i) c.lanes[i] += a.lanes[i] * b.lanes[i];
    return c;
  }
  static void add_absolute(float* total, const Sum& part) {
    for (int i = 0; i < kWidth; ++i) total[i] += std::fabs(part.lanes[i]);
  }
};

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Panels [steps, wide, 1] of fp32.
template <class T>
void pack_as_float(const PanelSource& source, int64_t wide, void* panel) {
  const auto* data = static_cast<const T*>(source.data);
  auto* to = static_cast<float*>(panel);
  const int64_t filled = std::min(wide, source.columns);
  for (int64_t b = 0; b < source.num_examples; ++b) {
    for (int64_t t = source.segments[2 * b]; t < source.segments[2 * b + 1]; ++t) {
      const T* row = data + source.offset_of(t);
      if (source.stride_w == 1) {
        for (int64_t w = 0; w < filled; ++w) to[w] = widen(row[w]);
      } else {
        for (int64_t w = 0; w < filled; ++w) to[w] = widen(row[w * source.stride_w]);
      }
      std::fill(to + filled, to + wide, 0.0f);
      to += wide;
    }
  }
}

#ifdef FASTDEAN_X86_LEVELS
// Panels [steps, wide, 2] of bf16 pairs; an odd example ends with a pair of one.
void pack_as_pairs(const PanelSource& source, int64_t wide, void* panel) {
  const auto* data = static_cast<const uint16_t*>(source.data);
  auto* to = static_cast<uint16_t*>(panel);
  const int64_t filled = std::min(wide, source.columns);
  for (int64_t b = 0; b < source.num_examples; ++b) {
    const int64_t end = source.segments[2 * b + 1];
    for (int64_t t = source.segments[2 * b]; t < end; t += 2) {
      const uint16_t* row = data + source.offset_of(t);
      const uint16_t* next = t + 1 == end ? nullptr : data + source.offset_of(t + 1);
      if (next == nullptr) {
        for (int64_t w = 0; w < filled; ++w) {
          to[2 * w] = row[w * source.stride_w];
          to[2 * w + 1] = 0;
        }
      } else if (source.stride_w == 1) {
        for (int64_t w = 0; w < filled; ++w) {
          to[2 * w] = row[w];
          to[2 * w + 1] = next[w];
        }
      } else {
        for (int64_t w = 0; w < filled; ++w) {
          to[2 * w] = row[w * source.stride_w];
          to[2 * w + 1] = next[w * source.stride_w];
        }
      }
      std::fill(to + 2 * filled, to + 2 * wide, uint16_t{0});
      to += 2 * wide;
    }
  }
}
#endif

Pack pack_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return &pack_as_float<BFloat16>;
    case DType::kFloat16:
      return &pack_as_float<Half>;
    default:
      return &pack_as_float<float>;
  }
}

}  // namespace

TileKernel kernel_of(CpuLevel level, DType dtype) {
#ifdef FASTDEAN_X86_LEVELS
  const bool bf16 = dtype == DType::kBFloat16;
#ifdef FASTDEAN_AMX_LEVEL
  if (bf16 && level == CpuLevel::kAmxBf16) return amx_bf16_tile();
#endif
  if (bf16 && level >= CpuLevel::kAvx512Bf16) return avx512_bf16_tile(&pack_as_pairs);
  if (level >= CpuLevel::kAvx512) return avx512_tile(pack_of(dtype));
  if (level == CpuLevel::kAvx2) return avx2_tile(pack_of(dtype));
#endif
  (void)level;
  return tile_kernel<Portable>(pack_of(dtype));
}

std::vector<Chunk> chunks_of(const int64_t* segments, int64_t num_segments,
                             const TileKernel& kernel) {
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < num_segments; ++b) {
    const int64_t length = segments[2 * b + 1] - segments[2 * b];
    const int64_t steps = (length + kernel.tokens - 1) / kernel.tokens;
    if (chunks.empty() || chunks.back().tokens + length > kernel.chunk_tokens) {
      chunks.push_back({b, 0, 0, 0});
    }
    chunks.back().count += 1;
    chunks.back().tokens += length;
    chunks.back().steps += steps;
  }
  return chunks;
}

std::vector<int64_t> steps_of(const int64_t* segments, const Chunk& chunk,
                              const TileKernel& kernel) {
  std::vector<int64_t> steps;
  for (int64_t b = chunk.first; b < chunk.first + chunk.count; ++b) {
    const int64_t length = segments[2 * b + 1] - segments[2 * b];
    steps.push_back((length + kernel.tokens - 1) / kernel.tokens);
  }
  return steps;
}

bool segments_fit(const int64_t* segments, int64_t num_segments, int64_t tokens) {
  for (int64_t b = 0; b < num_segments; ++b) {
    if (segments[2 * b] < 0 || segments[2 * b + 1] > tokens ||
        segments[2 * b] > segments[2 * b + 1]) {
      return false;
    }
  }
  return true;
}

namespace {

// How the work of one expert is cut.
struct Plan {
  TileKernel kernel;
  float* acc;               // of the expert
  const int64_t* segments;  // its examples
  std::vector<Chunk> chunks;
  int64_t row_panels;
  int64_t column_panels;
  int64_t g_panel_bytes;  // of the largest chunk
  int64_t x_panel_bytes;
  int64_t block_panels;  // column panels that a worker takes for one row panel

  int64_t workspace_bytes() const {
    return row_panels * g_panel_bytes + column_panels * x_panel_bytes + kAlignment;
  }
};

const int64_t* starts_of(const ImportanceParams& p) {
  return reinterpret_cast<const int64_t*>(p.expert_starts);
}

Plan plan_of(const ImportanceParams& p, int64_t expert) {
  const int64_t* starts = starts_of(p);
  Plan plan;
  plan.kernel = kernel_of(static_cast<CpuLevel>(p.level), static_cast<DType>(p.dtype));
  const TileKernel& kernel = plan.kernel;
  plan.acc = reinterpret_cast<float*>(p.acc) + expert * p.acc_stride_e;
  plan.segments = reinterpret_cast<const int64_t*>(p.segments) + 2 * starts[expert];
  plan.chunks = chunks_of(plan.segments, starts[expert + 1] - starts[expert], kernel);
  plan.row_panels = (p.rows + kernel.rows - 1) / kernel.rows;
  plan.column_panels = (p.columns + kernel.columns - 1) / kernel.columns;
  int64_t steps = 0;
  for (const Chunk& chunk : plan.chunks) steps = std::max(steps, chunk.steps);
  const int64_t step_bytes = kernel.tokens * kernel.bytes;
  plan.g_panel_bytes = round_up(steps * kernel.rows * step_bytes, kAlignment);
  plan.x_panel_bytes = round_up(steps * kernel.columns * step_bytes, kAlignment);
  const int64_t cached = kernel.block_bytes / std::max<int64_t>(plan.x_panel_bytes, 1);
  const int64_t shared = plan.row_panels * plan.column_panels / (kItemsPerWorker * p.num_workers);
  plan.block_panels = std::max<int64_t>(1, std::min({cached, shared, plan.column_panels}));
  return plan;
}

// Shared by the workers of one chunk.
struct Work {
  const ImportanceParams& p;
  const Plan& plan;
  const Chunk& chunk;
  const int64_t* steps;  // of each example of the chunk
  char* g_panels;        // [row panels] of g_panel_bytes
  char* x_panels;        // [column panels] of x_panel_bytes
  std::atomic<int64_t> next;
};

PanelSource source_of(const Work& work, int64_t data, int64_t stride_t, int64_t stride_w,
                      int64_t first, int64_t columns) {
  const int64_t bytes = element_bytes(work.p.dtype);
  return {reinterpret_cast<const char*>(data) + first * stride_w * bytes,
          stride_t,
          stride_w,
          columns - first,
          work.plan.segments + 2 * work.chunk.first,
          work.chunk.count,
          nullptr};
}

void pack_panels(void* context, int64_t) {
  auto& work = *static_cast<Work*>(context);
  const ImportanceParams& p = work.p;
  const TileKernel& kernel = work.plan.kernel;
  const int64_t of_g = work.plan.row_panels, of_x = work.plan.column_panels;
  for (int64_t item; (item = work.next.fetch_add(1)) < of_g + of_x;) {
    if (item < of_g) {
      kernel.pack_g(source_of(work, p.g, p.g_stride_t, p.g_stride_r, item * kernel.rows, p.rows),
                    kernel.rows, work.g_panels + item * work.plan.g_panel_bytes);
    } else {
      const int64_t c = item - of_g;
      kernel.pack_x(source_of(work, p.x, p.x_stride_t, p.x_stride_c, c * kernel.columns, p.columns),
                    kernel.columns, work.x_panels + c * work.plan.x_panel_bytes);
    }
  }
}

// A tile of the accumulator.
struct Place {
  float* acc;
  int64_t height;
  int64_t width;
};

Place place_of(const ImportanceParams& p, const Plan& plan, int64_t r, int64_t c) {
  const TileKernel& kernel = plan.kernel;
  const int64_t row = r * kernel.rows, column = c * kernel.columns;
  return {plan.acc + row * p.acc_stride_r + column * p.acc_stride_c,
          std::min(kernel.rows, p.rows - row), std::min(kernel.columns, p.columns - column)};
}

void add_tile(const ImportanceParams& p, const TileKernel& kernel, const Place& place,
              const float* total) {
  if (p.acc_stride_c == 1) {
    kernel.add(total, place.acc, p.acc_stride_r, place.height, place.width);
    return;
  }
  for (int64_t i = 0; i < place.height; ++i) {
    float* row = place.acc + i * p.acc_stride_r;
    for (int64_t j = 0; j < place.width; ++j) {
      row[j * p.acc_stride_c] += total[i * kernel.columns + j];
    }
  }
}

// Prefetches a tile of the accumulator, whose rows lie far apart, while its sums are computed.
void prefetch_tile(const ImportanceParams& p, const Place& place) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr int64_t kLine = kAlignment / sizeof(float);
  for (int64_t i = 0; i < place.height; ++i) {
    const float* row = place.acc + i * p.acc_stride_r;
    for (int64_t j = 0; j < place.width; j += kLine) {
      __builtin_prefetch(row + j * p.acc_stride_c, 1);
    }
  }
#else
  (void)p, (void)place;
#endif
}

void take_blocks(void* context, int64_t) {
  auto& work = *static_cast<Work*>(context);
  const ImportanceParams& p = work.p;
  const Plan& plan = work.plan;
  const TileKernel& kernel = plan.kernel;
  alignas(kAlignment) float total[kMostTileEntries];
  const int64_t blocks = (plan.column_panels + plan.block_panels - 1) / plan.block_panels;
  kernel.enter();
  for (int64_t item; (item = work.next.fetch_add(1)) < blocks * plan.row_panels;) {
    const int64_t r = item % plan.row_panels;
    const int64_t first = item / plan.row_panels * plan.block_panels;
    const int64_t end = std::min(first + plan.block_panels, plan.column_panels);
    for (int64_t c = first; c < end; ++c) {
      const Place place = place_of(p, plan, r, c);
      prefetch_tile(p, place);
      kernel.run(work.g_panels + r * plan.g_panel_bytes, work.x_panels + c * plan.x_panel_bytes,
                 work.steps, work.chunk.count, total);
      add_tile(p, kernel, place, total);
    }
  }
  kernel.leave();
}

}  // namespace

CpuLevel best_cpu_level() {
#ifdef FASTDEAN_X86_LEVELS
  if (__builtin_cpu_supports("avx512f")) {
    if (!__builtin_cpu_supports("avx512bf16")) return CpuLevel::kAvx512;
#ifdef FASTDEAN_AMX_LEVEL
    if (amx_bf16_granted()) return CpuLevel::kAmxBf16;
#endif
    return CpuLevel::kAvx512Bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

int64_t accumulate_importance_workspace_bytes(const ImportanceParams& p) {
  int64_t bytes = 0;
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    bytes = std::max(bytes, plan_of(p, expert).workspace_bytes());
  }
  return bytes;
}

Status accumulate_importance_cpu(const ImportanceParams& p) {
  if (p.level < 0 || p.level > static_cast<int64_t>(best_cpu_level())) {
    return Status::kUnsupportedLevel;
  }
  if (element_bytes(p.dtype) == 0 || p.dtype == static_cast<int64_t>(DType::kFloat64)) {
    return Status::kUnknownDType;
  }
  if (!segments_fit(reinterpret_cast<const int64_t*>(p.segments), starts_of(p)[p.experts],
                    p.tokens)) {
    return Status::kIndexOutOfRange;
  }
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    const Plan plan = plan_of(p, expert);
    for (const Chunk& chunk : plan.chunks) {
      const std::vector<int64_t> steps = steps_of(plan.segments, chunk, plan.kernel);
      char* start = reinterpret_cast<char*>(round_up(p.workspace, kAlignment));
      Work work{p,  plan, chunk, steps.data(), start, start + plan.row_panels * plan.g_panel_bytes,
                {0}};
      run_workers(p.num_workers, pack_panels, &work);
      work.next = 0;
      run_workers(p.num_workers, take_blocks, &work);
    }
  }
  return Status::kOk;
}

}  // namespace fastdean
