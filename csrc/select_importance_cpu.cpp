// select_importance on the CPU.
//
// One expert after the other; an ordinary weight is one. All of an expert's workers share what is
// packed of its examples. A worker takes a stripe, some rows of the weight, and for one set after the
// other completes the sums of the stripe over all examples, with the tiles, the chunks and the order of additions of
// accumulate_importance; then it scans them, as select_top does, and forgets them. A stripe's sums
// and its part of G stay in the second-level cache. X is packed once, for as many columns (a slab)
// as have room; G once for each slab. The number of workers does not change the result.
#include <algorithm>
#include <atomic>
#include <vector>

#include "fastdean.h"
#include "importance_chunks.h"
#include "parallel.h"
#include "selection_spans.h"
#include "signed_sums.h"

namespace fastdean {
namespace {

constexpr int64_t kSlabBytes = 64 << 20;   // of packed X
constexpr int64_t kStripeBytes = 1 << 20;  // of a stripe's sums
// Enough for workers of unequal speed to finish together.
constexpr int64_t kStripesPerWorker = 4;

int64_t round_up(int64_t value) {
  return (value + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
}

// Some examples of one set.
struct Piece {
  Chunk chunk;  // numbers among all examples
  std::vector<int64_t> steps;
  int64_t x_offset;  // of its panel in what is packed of a column panel
};

struct Plan {
  TileKernel kernel;
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece;  // [num_sets + 1]
  int64_t row_panels;
  int64_t column_panels;
  int64_t stripe_panels;
  int64_t slab_panels;
  int64_t g_panel_bytes;  // of the largest chunk
  int64_t x_panel_bytes;  // of all chunks
  int64_t block_panels;   // column panels whose X stays in the cache beside the stripe's G
  int64_t sums_stride;    // columns of a slab
  std::vector<int64_t> capacities;  // [num_sets], candidates of a worker

  int64_t slab_bytes() const { return slab_panels * x_panel_bytes; }
  int64_t stripe_bytes() const {
    return round_up(stripe_panels * kernel.rows * sums_stride * 4) + stripe_panels * g_panel_bytes;
  }
};

// The first example of each of an expert's groups, [num_sets + 1] with the end.
const int64_t* starts_of(const ImportanceSelectionParams& p, int64_t expert) {
  return reinterpret_cast<const int64_t*>(p.group_starts) + expert * p.num_sets;
}

// Of one group, as the calls of accumulate_importance that took one batch after the other cut them.
std::vector<Chunk> chunks_of_group(const ImportanceSelectionParams& p, int64_t first, int64_t end,
                                   const TileKernel& kernel) {
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  const auto* batches = reinterpret_cast<const int64_t*>(p.batches);
  std::vector<Chunk> found;
  while (first < end) {
    int64_t next = batches == nullptr ? end : first + 1;
    while (next < end && batches[next] == batches[first]) ++next;
    for (Chunk chunk : chunks_of(segments + 2 * first, next - first, kernel)) {
      chunk.first += first;
      found.push_back(chunk);
    }
    first = next;
  }
  return found;
}

// How the work of one expert is cut.
Plan plan_of(const ImportanceSelectionParams& p, int64_t expert) {
  Plan plan;
  plan.kernel = kernel_of(static_cast<CpuLevel>(p.level), static_cast<DType>(p.dtype));
  const TileKernel& kernel = plan.kernel;
  const auto* segments = reinterpret_cast<const int64_t*>(p.segments);
  const int64_t* starts = starts_of(p, expert);
  const auto* ks = reinterpret_cast<const int64_t*>(p.ks);
  const int64_t step_bytes = kernel.tokens * kernel.bytes;
  int64_t steps = 0;
  plan.x_panel_bytes = 0;
  int64_t largest_x = 1;
  for (int64_t set = 0; set < p.num_sets; ++set) {
    plan.first_piece.push_back(static_cast<int64_t>(plan.pieces.size()));
    plan.capacities.push_back(TopCandidates::capacity_for(ks[set], p.rows * p.columns));
    for (const Chunk& chunk : chunks_of_group(p, starts[set], starts[set + 1], kernel)) {
      plan.pieces.push_back({chunk, steps_of(segments, chunk, kernel), plan.x_panel_bytes});
      const int64_t bytes = round_up(chunk.steps * kernel.columns * step_bytes);
      plan.x_panel_bytes += bytes;
      largest_x = std::max(largest_x, bytes);
      steps = std::max(steps, chunk.steps);
    }
  }
  plan.first_piece.push_back(static_cast<int64_t>(plan.pieces.size()));
  plan.row_panels = (p.rows + kernel.rows - 1) / kernel.rows;
  plan.column_panels = (p.columns + kernel.columns - 1) / kernel.columns;
  plan.g_panel_bytes = round_up(steps * kernel.rows * step_bytes);
  plan.stripe_panels = std::max<int64_t>(
      1, std::min(kernel.block_bytes / 2 / std::max<int64_t>(plan.g_panel_bytes, 1),
                  plan.row_panels / (kStripesPerWorker * p.num_workers)));
  // However short the examples are, a stripe must leave room for many columns.
  plan.stripe_panels = std::min(plan.stripe_panels, std::max<int64_t>(1, 96 / kernel.rows));
  const int64_t column_bytes = plan.stripe_panels * kernel.rows * kernel.columns * 4;
  plan.slab_panels =
      std::max<int64_t>(1, std::min({plan.column_panels, kStripeBytes / column_bytes,
                                     kSlabBytes / std::max<int64_t>(plan.x_panel_bytes, 1)}));
  plan.block_panels = std::max<int64_t>(1, kernel.block_bytes / largest_x);
  plan.sums_stride = plan.slab_panels * kernel.columns;
  return plan;
}

struct Job {
  const ImportanceSelectionParams& p;
  int64_t expert;
  const Plan& plan;
  const std::vector<Importance>& importance;  // [num_sets]
  std::vector<TopCandidates>& candidates;     // [num_sets, num_workers]
  std::vector<Flaw>& flaws;                   // [num_sets, num_workers]
  char* x_panels;                             // [slab_panels] of x_panel_bytes
  char* stripes;                              // [num_workers] of stripe_bytes
  int64_t first_panel;                        // of the slab
  int64_t num_panels;                         // in the slab
  std::atomic<int64_t> next;
};

PanelSource source_of(const Job& job, const Piece& piece, int64_t data, int64_t stride_t,
                      int64_t stride_w, int64_t rows, int64_t first, int64_t columns) {
  return {reinterpret_cast<const char*>(data) + first * stride_w * element_bytes(job.p.dtype),
          stride_t,
          stride_w,
          columns - first,
          reinterpret_cast<const int64_t*>(job.p.segments) + 2 * piece.chunk.first,
          piece.chunk.count,
          reinterpret_cast<const int64_t*>(rows)};
}

void pack_slab(void* context, int64_t) {
  auto& job = *static_cast<Job*>(context);
  const ImportanceSelectionParams& p = job.p;
  const TileKernel& kernel = job.plan.kernel;
  for (int64_t c; (c = job.next.fetch_add(1)) < job.num_panels;) {
    const int64_t column = (job.first_panel + c) * kernel.columns;
    for (const Piece& piece : job.plan.pieces) {
      kernel.pack_x(
          source_of(job, piece, p.x, p.x_stride_t, p.x_stride_c, p.x_rows, column, p.columns),
          kernel.columns, job.x_panels + c * job.plan.x_panel_bytes + piece.x_offset);
    }
  }
}

// Adds one chunk's sums to those of a stripe.
void add_piece(const Job& job, const Piece& piece, int64_t first_row, int64_t panels, float* sums,
               char* g_panels) {
  const ImportanceSelectionParams& p = job.p;
  const Plan& plan = job.plan;
  const TileKernel& kernel = plan.kernel;
  for (int64_t r = 0; r < panels; ++r) {
    kernel.pack_g(source_of(job, piece, p.g, p.g_stride_t, p.g_stride_r, p.g_rows,
                            first_row + r * kernel.rows, p.rows),
                  kernel.rows, g_panels + r * plan.g_panel_bytes);
  }
  alignas(kPanelAlignment) float total[kMostTileEntries];
  for (int64_t first = 0; first < job.num_panels; first += plan.block_panels) {
    const int64_t end = std::min(first + plan.block_panels, job.num_panels);
    for (int64_t r = 0; r < panels; ++r) {
      for (int64_t c = first; c < end; ++c) {
        kernel.run(g_panels + r * plan.g_panel_bytes,
                   job.x_panels + c * plan.x_panel_bytes + piece.x_offset, piece.steps.data(),
                   piece.chunk.count, total);
        kernel.add(total, sums + r * kernel.rows * plan.sums_stride + c * kernel.columns,
                   plan.sums_stride, kernel.rows, kernel.columns);
      }
    }
  }
}

void take_stripes(void* context, int64_t worker) {
  auto& job = *static_cast<Job*>(context);
  const ImportanceSelectionParams& p = job.p;
  const Plan& plan = job.plan;
  const TileKernel& kernel = plan.kernel;
  auto* sums = reinterpret_cast<float*>(job.stripes + worker * plan.stripe_bytes());
  char* g_panels = reinterpret_cast<char*>(sums) +
                   round_up(plan.stripe_panels * kernel.rows * plan.sums_stride * 4);
  const int64_t first_column = job.first_panel * kernel.columns;
  const int64_t width = std::min(job.num_panels * kernel.columns, p.columns - first_column);
  const int64_t weight_bytes = element_bytes(p.weight_dtype);
  const char* expert_weight =
      reinterpret_cast<const char*>(p.weight) + job.expert * p.weight_stride_e * weight_bytes;
  // Later stripes lie further down; another slab begins at the top again.
  const bool ascending = plan.slab_panels == plan.column_panels;
  kernel.enter();
  for (int64_t item; (item = job.next.fetch_add(1)) * plan.stripe_panels < plan.row_panels;) {
    const int64_t first_row = item * plan.stripe_panels * kernel.rows;
    const int64_t panels =
        std::min(plan.stripe_panels, plan.row_panels - item * plan.stripe_panels);
    const int64_t height = std::min(panels * kernel.rows, p.rows - first_row);
    for (int64_t set = 0; set < p.num_sets; ++set) {
      std::fill(sums, sums + panels * kernel.rows * plan.sums_stride, 0.0f);
      for (int64_t i = plan.first_piece[set]; i < plan.first_piece[set + 1]; ++i) {
        add_piece(job, plan.pieces[i], first_row, panels, sums, g_panels);
      }
      const int64_t mine = set * p.num_workers + worker;
      for (int64_t row = first_row; row < first_row + height; ++row) {
        const char* weight =
            expert_weight + (row * p.weight_stride_r + first_column) * weight_bytes;
        take_span(job.importance[set], sums + (row - first_row) * plan.sums_stride, weight, width,
                  (job.expert * p.rows + row) * p.columns + first_column, ascending,
                  &job.candidates[mine], &job.flaws[mine]);
      }
    }
  }
  kernel.leave();
}

// Where a group's results go.
struct Results {
  int64_t* indices;
  float* sums;
  float* signed_sums;  // or null
  int64_t* found;      // [3]
};

void write_results(const Job& job, int64_t set, Candidate* room, const Results& results) {
  const ImportanceSelectionParams& p = job.p;
  const int64_t k = reinterpret_cast<const int64_t*>(p.ks)[set];
  std::vector<int64_t> sizes(p.num_workers);
  Flaw flaw;
  for (int64_t worker = 0; worker < p.num_workers; ++worker) {
    const int64_t mine = set * p.num_workers + worker;
    sizes[worker] = job.candidates[mine].size();
    const Flaw& other = job.flaws[mine];
    if (other.index >= 0 && (flaw.index < 0 || other.index < flaw.index)) flaw = other;
  }
  const int64_t count = join(room, job.plan.capacities[set], sizes.data(), p.num_workers, k,
                             results.indices, results.sums);
  write_found(results.found, count, flaw);
  if (results.signed_sums == nullptr) return;
  const int64_t* starts = starts_of(p, job.expert);
  write_signed_sums({{p.x, p.x_stride_t, p.x_stride_c, reinterpret_cast<const int64_t*>(p.x_rows)},
                     {p.g, p.g_stride_t, p.g_stride_r, reinterpret_cast<const int64_t*>(p.g_rows)},
                     p.dtype,
                     reinterpret_cast<const int64_t*>(p.segments) + 2 * starts[set],
                     starts[set + 1] - starts[set],
                     results.indices,
                     job.expert * p.rows * p.columns,
                     count,
                     p.columns,
                     results.signed_sums},
                    p.num_workers);
}

// Everything of one expert; `results` moves on to the next one's.
void take_expert(const ImportanceSelectionParams& p, int64_t expert, Scan scan, Results* results) {
  const auto* ks = reinterpret_cast<const int64_t*>(p.ks);
  const auto* num_examples = reinterpret_cast<const int64_t*>(p.num_examples);
  const Plan plan = plan_of(p, expert);
  char* x_panels = reinterpret_cast<char*>(round_up(p.workspace));
  char* stripes = x_panels + plan.slab_bytes();
  auto* room = reinterpret_cast<Candidate*>(stripes + p.num_workers * plan.stripe_bytes());
  std::vector<Importance> importance;
  std::vector<TopCandidates> candidates;
  std::vector<Candidate*> rooms;
  for (int64_t set = 0; set < p.num_sets; ++set) {
    importance.push_back({scan, static_cast<float>(num_examples[set])});
    rooms.push_back(room);
    for (int64_t worker = 0; worker < p.num_workers; ++worker) {
      candidates.emplace_back(room, plan.capacities[set], ks[set]);
      room += plan.capacities[set];
    }
  }
  std::vector<Flaw> flaws(p.num_sets * p.num_workers);
  Job job{p, expert, plan, importance, candidates, flaws, x_panels, stripes, 0, 0, {0}};
  for (int64_t first = 0; first < plan.column_panels; first += plan.slab_panels) {
    job.first_panel = first;
    job.num_panels = std::min(plan.slab_panels, plan.column_panels - first);
    job.next = 0;
    run_workers(p.num_workers, pack_slab, &job);
    job.next = 0;
    run_workers(p.num_workers, take_stripes, &job);
  }
  for (int64_t set = 0; set < p.num_sets; ++set) {
    write_results(job, set, rooms[set], *results);
    results->indices += ks[set];
    results->sums += ks[set];
    if (results->signed_sums != nullptr) results->signed_sums += ks[set];
    results->found += 3;
  }
}

}  // namespace

int64_t select_importance_workspace_bytes(const ImportanceSelectionParams& p) {
  int64_t most = 0;
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    const Plan plan = plan_of(p, expert);
    int64_t candidates = 0;
    for (const int64_t capacity : plan.capacities) candidates += capacity;
    most = std::max(most, plan.slab_bytes() + p.num_workers * plan.stripe_bytes() +
                              p.num_workers * candidates * static_cast<int64_t>(sizeof(Candidate)));
  }
  return most + kPanelAlignment;
}

Status select_importance_cpu(const ImportanceSelectionParams& p) {
  if (p.level < 0 || p.level > static_cast<int64_t>(best_cpu_level())) {
    return Status::kUnsupportedLevel;
  }
  if (element_bytes(p.dtype) == 0 || p.dtype == static_cast<int64_t>(DType::kFloat64)) {
    return Status::kUnknownDType;
  }
  const Scan scan = scan_of(static_cast<CpuLevel>(p.level), true, p.weight_dtype);
  if (scan == nullptr) return Status::kUnknownDType;
  const int64_t examples = starts_of(p, p.experts)[0];
  if (!segments_fit(reinterpret_cast<const int64_t*>(p.segments), examples, p.tokens)) {
    return Status::kIndexOutOfRange;
  }
  Results results{reinterpret_cast<int64_t*>(p.indices), reinterpret_cast<float*>(p.sums),
                  reinterpret_cast<float*>(p.signed_sums), reinterpret_cast<int64_t*>(p.found)};
  for (int64_t expert = 0; expert < p.experts; ++expert) take_expert(p, expert, scan, &results);
  return Status::kOk;
}

}  // namespace fastdean
