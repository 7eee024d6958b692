// accumulate_importance on the CPU.
//
// Tokens of whole examples are taken together while they fit a chunk. A chunk's G is packed once
// into panels of a tile's rows; each worker then takes column panels of X one after the other,
// packs one, and walks down the weight: the panel of X stays in the first-level cache, the tile's
// sums in registers, and the accumulator is read and written once per chunk. Every tile is computed
// by one worker in one order, so the result does not depend on the number of workers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "fastdean.h"
#include "floats.h"
#include "importance_levels.h"
#include "importance_tile.h"
#include "parallel.h"

namespace fastdean {
namespace {

constexpr int64_t kChunkTokens = 384;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMostTileEntries = 12 * 32;

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

TileKernel kernel_of(CpuLevel level) {
  switch (level) {
#ifdef FASTDEAN_X86_LEVELS
    case CpuLevel::kAvx2:
      return avx2_tile();
    case CpuLevel::kAvx512:
      return avx512_tile();
    case CpuLevel::kAvx512Bf16:
      return avx512_bf16_tile();
#endif
    default:
      return tile_kernel<Portable>();
  }
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A matrix of the batch, [tokens, width], any strides.
struct Source {
  int64_t data;
  int64_t stride_t;
  int64_t stride_w;
  int64_t width;
};

// Some whole examples.
struct Chunk {
  int64_t first;   // number of its first example
  int64_t count;   // how many examples
  int64_t tokens;  // of all of them
  int64_t steps;   // of all of them, in steps of the level
};

std::vector<Chunk> chunks_of(const ImportanceParams& p, int64_t tokens_per_step) {
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < p.num_segments; ++b) {
    const int64_t length = segments[2 * b + 1] - segments[2 * b];
    const int64_t steps = (length + tokens_per_step - 1) / tokens_per_step;
    if (chunks.empty() || chunks.back().tokens + length > kChunkTokens) {
      chunks.push_back({b, 0, 0, 0});
    }
    chunks.back().count += 1;
    chunks.back().tokens += length;
    chunks.back().steps += steps;
  }
  return chunks;
}

// Columns [start, start + wide) of a chunk's tokens, as panel [steps, wide, 1] of fp32; columns
// beyond the matrix are 0.
template <class T>
void pack_as_float(const ImportanceParams& p, const Chunk& chunk, const Source& source,
                   int64_t start, int64_t wide, float* panel) {
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  const auto* data = reinterpret_cast<const T*>(source.data) + start * source.stride_w;
  const int64_t filled = std::min(wide, source.width - start);
  for (int64_t b = chunk.first; b < chunk.first + chunk.count; ++b) {
    for (int64_t t = segments[2 * b]; t < segments[2 * b + 1]; ++t) {
      const T* row = data + t * source.stride_t;
      if (source.stride_w == 1) {
        for (int64_t w = 0; w < filled; ++w) panel[w] = widen(row[w]);
      } else {
        for (int64_t w = 0; w < filled; ++w) panel[w] = widen(row[w * source.stride_w]);
      }
      std::fill(panel + filled, panel + wide, 0.0f);
      panel += wide;
    }
  }
}

// The same as panel [steps, wide, 2] of bf16 pairs; an odd example ends with a pair of one.
void pack_as_pairs(const ImportanceParams& p, const Chunk& chunk, const Source& source,
                   int64_t start, int64_t wide, uint16_t* panel) {
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  const auto* data = reinterpret_cast<const uint16_t*>(source.data) + start * source.stride_w;
  const int64_t filled = std::min(wide, source.width - start);
  for (int64_t b = chunk.first; b < chunk.first + chunk.count; ++b) {
    for (int64_t t = segments[2 * b]; t < segments[2 * b + 1]; t += 2) {
      const bool two = t + 1 < segments[2 * b + 1];
      const uint16_t* row = data + t * source.stride_t;
      for (int64_t w = 0; w < wide; ++w) {
        const bool inside = w < filled;
        panel[2 * w] = inside ? row[w * source.stride_w] : uint16_t{0};
        panel[2 * w + 1] = inside && two ? row[w * source.stride_w + source.stride_t] : uint16_t{0};
      }
      panel += 2 * wide;
    }
  }
}

void pack(const ImportanceParams& p, const TileKernel& kernel, const Chunk& chunk,
          const Source& source, int64_t start, int64_t wide, char* panel) {
  auto* floats = reinterpret_cast<float*>(panel);
  if (kernel.tokens == 2) {
    pack_as_pairs(p, chunk, source, start, wide, reinterpret_cast<uint16_t*>(panel));
  } else if (p.dtype == static_cast<int64_t>(DType::kFloat32)) {
    pack_as_float<float>(p, chunk, source, start, wide, floats);
  } else if (p.dtype == static_cast<int64_t>(DType::kBFloat16)) {
    pack_as_float<BFloat16>(p, chunk, source, start, wide, floats);
  } else {
    pack_as_float<Half>(p, chunk, source, start, wide, floats);
  }
}

// What the workers share while they work on one chunk.
struct Work {
  const ImportanceParams* params;
  TileKernel kernel;
  Chunk chunk;
  const int64_t* steps;  // of each example of the chunk
  char* g_panels;        // [row panels] of g_panel_bytes
  int64_t g_panel_bytes;
  char* x_panels;  // [workers] of x_panel_bytes
  int64_t x_panel_bytes;
  int64_t row_panels;
  int64_t column_panels;
  std::atomic<int64_t> next;
};

Source source_x(const ImportanceParams& p) { return {p.x, p.x_stride_t, p.x_stride_c, p.columns}; }
Source source_g(const ImportanceParams& p) { return {p.g, p.g_stride_t, p.g_stride_r, p.rows}; }

void pack_rows(void* context, int64_t) {
  auto* work = static_cast<Work*>(context);
  const TileKernel& kernel = work->kernel;
  for (int64_t r; (r = work->next.fetch_add(1)) < work->row_panels;) {
    pack(*work->params, kernel, work->chunk, source_g(*work->params), r * kernel.rows, kernel.rows,
         work->g_panels + r * work->g_panel_bytes);
  }
}

void add_tile(const ImportanceParams& p, const TileKernel& kernel, int64_t r, int64_t c,
              const float* total) {
  auto* acc = reinterpret_cast<float*>(p.acc);
  const int64_t height = std::min(kernel.rows, p.rows - r);
  const int64_t width = std::min(kernel.columns, p.columns - c);
  for (int64_t i = 0; i < height; ++i) {
    float* row = acc + (r + i) * p.acc_stride_r + c * p.acc_stride_c;
    const float* sums = total + i * kernel.columns;
    if (p.acc_stride_c == 1) {
      for (int64_t j = 0; j < width; ++j) row[j] += sums[j];
    } else {
      for (int64_t j = 0; j < width; ++j) row[j * p.acc_stride_c] += sums[j];
    }
  }
}

// Asks for a tile of the accumulator, whose rows lie far apart, while its sums are computed.
void prefetch_tile(const ImportanceParams& p, const TileKernel& kernel, int64_t r, int64_t c) {
#if defined(__GNUC__) || defined(__clang__)
  const auto* acc = reinterpret_cast<const float*>(p.acc);
  const int64_t height = std::min(kernel.rows, p.rows - r);
  for (int64_t i = 0; i < height; ++i) {
    __builtin_prefetch(acc + (r + i) * p.acc_stride_r + c * p.acc_stride_c, 1);
  }
#else
  (void)p, (void)kernel, (void)r, (void)c;
#endif
}

void take_columns(void* context, int64_t worker) {
  auto* work = static_cast<Work*>(context);
  const ImportanceParams& p = *work->params;
  const TileKernel& kernel = work->kernel;
  char* x_panel = work->x_panels + worker * work->x_panel_bytes;
  alignas(kAlignment) float total[kMostTileEntries];
  for (int64_t c; (c = work->next.fetch_add(1)) < work->column_panels;) {
    pack(p, kernel, work->chunk, source_x(p), c * kernel.columns, kernel.columns, x_panel);
    for (int64_t r = 0; r < work->row_panels; ++r) {
      prefetch_tile(p, kernel, r * kernel.rows, c * kernel.columns);
      std::fill(total, total + kernel.rows * kernel.columns, 0.0f);
      kernel.run(work->g_panels + r * work->g_panel_bytes, x_panel, work->steps, work->chunk.count,
                 total);
      add_tile(p, kernel, r * kernel.rows, c * kernel.columns, total);
    }
  }
}

int64_t panel_bytes(const TileKernel& kernel, int64_t steps, int64_t wide) {
  const int64_t element_bytes = kernel.tokens == 2 ? 2 * 2 : 4;
  return round_up(steps * wide * element_bytes, kAlignment);
}

struct Plan {
  TileKernel kernel;
  std::vector<Chunk> chunks;
  int64_t row_panels;
  int64_t column_panels;
  int64_t g_panel_bytes;  // of the largest chunk
  int64_t x_panel_bytes;
};

Plan plan_of(const ImportanceParams& p) {
  const auto level = static_cast<CpuLevel>(p.level);
  const bool pairs =
      level == CpuLevel::kAvx512Bf16 && p.dtype == static_cast<int64_t>(DType::kBFloat16);
  // The bf16 instructions serve bf16 inputs alone.
  Plan plan;
  plan.kernel = kernel_of(level == CpuLevel::kAvx512Bf16 && !pairs ? CpuLevel::kAvx512 : level);
  plan.chunks = chunks_of(p, plan.kernel.tokens);
  plan.row_panels = (p.rows + plan.kernel.rows - 1) / plan.kernel.rows;
  plan.column_panels = (p.columns + plan.kernel.columns - 1) / plan.kernel.columns;
  int64_t steps = 0;
  for (const Chunk& chunk : plan.chunks) steps = std::max(steps, chunk.steps);
  plan.g_panel_bytes = panel_bytes(plan.kernel, steps, plan.kernel.rows);
  plan.x_panel_bytes = panel_bytes(plan.kernel, steps, plan.kernel.columns);
  return plan;
}

}  // namespace

CpuLevel best_cpu_level() {
#ifdef FASTDEAN_X86_LEVELS
  if (__builtin_cpu_supports("avx512f")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

int64_t accumulate_importance_workspace_bytes(const ImportanceParams& p) {
  const Plan plan = plan_of(p);
  return plan.row_panels * plan.g_panel_bytes + p.num_workers * plan.x_panel_bytes + kAlignment;
}

Status accumulate_importance_cpu(const ImportanceParams& p) {
  if (p.level < 0 || p.level > static_cast<int64_t>(best_cpu_level())) {
    return Status::kUnsupportedLevel;
  }
  if (element_bytes(p.dtype) == 0 || p.dtype == static_cast<int64_t>(DType::kFloat64)) {
    return Status::kUnknownDType;
  }
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  for (int64_t b = 0; b < p.num_segments; ++b) {
    if (segments[2 * b] < 0 || segments[2 * b + 1] > p.tokens ||
        segments[2 * b] > segments[2 * b + 1]) {
      return Status::kIndexOutOfRange;
    }
  }
  const Plan plan = plan_of(p);
  std::vector<int64_t> steps;
  for (const Chunk& chunk : plan.chunks) {
    steps.clear();
    for (int64_t b = chunk.first; b < chunk.first + chunk.count; ++b) {
      const int64_t length = segments[2 * b + 1] - segments[2 * b];
      steps.push_back((length + plan.kernel.tokens - 1) / plan.kernel.tokens);
    }
    char* start = reinterpret_cast<char*>(round_up(p.workspace, kAlignment));
    char* x_panels = start + plan.row_panels * plan.g_panel_bytes;
    Work work{&p,
              plan.kernel,
              chunk,
              steps.data(),
              start,
              plan.g_panel_bytes,
              x_panels,
              plan.x_panel_bytes,
              plan.row_panels,
              plan.column_panels,
              {0}};
    run_workers(p.num_workers, pack_rows, &work);
    work.next = 0;
    run_workers(p.num_workers, take_columns, &work);
  }
  return Status::kOk;
}

}  // namespace fastdean
