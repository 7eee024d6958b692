// select_top on the CPU.
//
// One pass over sums and weight. Every worker reads one part of the matrix, in the order of the
// flat indices, and keeps the k first entries of its part: in groups it looks for products that
// reach the least of them, and only those groups' entries are divided and compared. The k first of
// what the workers have kept are those of the matrix, however it was divided.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "fastdean.h"
#include "parallel.h"
#include "selection_scan.h"
#include "selection_spans.h"

namespace fastdean {
namespace {

// Starting a thread costs more than fewer entries.
constexpr int64_t kLeastPerWorker = 1 << 16;
// Entries that are gathered at a time where they do not lie side by side.
constexpr int64_t kGathered = 16 * kGroup;

// How the matrix is divided.
struct Division {
  int64_t numel;
  int64_t num_workers;
  int64_t capacity;  // candidates of a worker

  int64_t start(int64_t worker) const {
    // No product of the two, which could be too large.
    return numel / num_workers * worker + std::min(worker, numel % num_workers);
  }
};

Division division_of(const SelectionParams& p) {
  const int64_t numel = p.rows * p.columns;
  const int64_t most = std::max<int64_t>(1, numel / kLeastPerWorker);
  const int64_t workers = std::min(most, std::max<int64_t>(1, p.num_workers));
  return {numel, workers, TopCandidates::capacity_for(p.k, (numel + workers - 1) / workers)};
}

struct Job {
  const SelectionParams& p;
  const Division& division;
  const Importance& importance;
  int64_t* sizes;               // [workers]
  Flaw* flaws;                  // [workers]
  std::atomic<int64_t> flawed;  // the first worker with a flaw
};

// Copies `count` elements that lie `stride` apart.
void gather(void* to, int64_t data, int64_t offset, int64_t stride, int64_t count, int64_t bytes) {
  const char* from = reinterpret_cast<const char*>(data) + offset * bytes;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<char*>(to) + i * bytes, from + i * stride * bytes, bytes);
  }
}

// Part of a row. What does not lie side by side is gathered.
bool take_row(const Job& job, int64_t row, int64_t column, int64_t count, TopCandidates* candidates,
              Flaw* flaw) {
  const SelectionParams& p = job.p;
  const int64_t bytes = p.weight == 0 ? 0 : element_bytes(p.weight_dtype);
  const bool gathers_sums = p.sums_stride_c != 1;
  const bool gathers_weight = p.weight != 0 && p.weight_stride_c != 1;
  alignas(64) float sums[kGathered];
  alignas(64) double weight[kGathered];
  const int64_t step = gathers_sums || gathers_weight ? kGathered : count;
  for (int64_t done = 0; done < count; done += step) {
    const int64_t first = column + done, some = std::min(step, count - done);
    const int64_t sums_offset = row * p.sums_stride_r + first * p.sums_stride_c;
    const int64_t weight_offset = row * p.weight_stride_r + first * p.weight_stride_c;
    const auto* these_sums = reinterpret_cast<const float*>(p.sums) + sums_offset;
    const void* these_weights = reinterpret_cast<const char*>(p.weight) + weight_offset * bytes;
    if (gathers_sums) {
      gather(sums, p.sums, sums_offset, p.sums_stride_c, some, sizeof(float));
      these_sums = sums;
    }
    if (gathers_weight) {
      gather(weight, p.weight, weight_offset, p.weight_stride_c, some, bytes);
      these_weights = weight;
    }
    if (!take_span(job.importance, these_sums, these_weights, some, row * p.columns + first, true,
                   candidates, flaw)) {
      return false;
    }
  }
  return true;
}

void take_part(void* context, int64_t worker) {
  auto& job = *static_cast<Job*>(context);
  const Division& division = job.division;
  auto* room = reinterpret_cast<Candidate*>(job.p.workspace) + worker * division.capacity;
  TopCandidates candidates(room, division.capacity, job.p.k);
  const int64_t columns = job.p.columns, end = division.start(worker + 1);
  constexpr int64_t kLooks = 1 << 20;
  for (int64_t flat = division.start(worker); flat < end;) {
    // A flaw that comes before this part ends the call.
    if (job.flawed.load(std::memory_order_relaxed) < worker) return;
    const int64_t column = flat % columns;
    const int64_t count = std::min({end - flat, columns - column, kLooks});
    if (!take_row(job, flat / columns, column, count, &candidates, &job.flaws[worker])) {
      int64_t first = job.flawed.load();
      while (worker < first && !job.flawed.compare_exchange_weak(first, worker)) {
      }
      return;
    }
    flat += count;
  }
  job.sizes[worker] = candidates.size();
}

Scans scans_of(CpuLevel level) {
#ifdef FASTDEAN_X86_LEVELS
  if (level >= CpuLevel::kAvx2) return avx2_scans();
#endif
  (void)level;
  return scans();
}

}  // namespace

Scan scan_of(CpuLevel level, bool has_weight, int64_t dtype) {
  const Scans scans = scans_of(level);
  if (!has_weight) return scans.unweighted;
  return element_bytes(dtype) == 0 ? nullptr : scans.of[dtype];
}

bool take_span(const Importance& importance, const float* sums, const void* weight, int64_t count,
               int64_t index, bool ascending, TopCandidates* candidates, Flaw* flaw) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  alignas(64) float products[kGroup];
  float known = -1.0f, least = 0.0f;
  for (int64_t group = 0; group < count; group += kGroup) {
    if (candidates->least() != known) {
      known = candidates->least();
      // In ascending order an equal one comes too late.
      const float wanted = ascending ? std::nextafterf(known, kInfinity) : known;
      least = candidates->takes_none() ? kInfinity : least_product(wanted, importance.divisor);
    }
    group = importance.scan(sums, weight, group, count, least, products);
    const int64_t end = std::min(group + kGroup, count);
    for (int64_t i = group; i < end; ++i) {
      const float product = products[i - group];
      if (!(std::fabs(product) < kInfinity)) {
        if (flaw->index < 0 || index + i < flaw->index) {
          *flaw = {index + i, product / importance.divisor};
        }
        return false;
      }
      if (product >= least) candidates->add({product / importance.divisor, sums[i], index + i});
    }
  }
  return true;
}

int64_t join(Candidate* all, int64_t capacity, const int64_t* sizes, int64_t num_workers, int64_t k,
             int64_t* indices, float* sums) {
  int64_t size = 0;
  for (int64_t worker = 0; worker < num_workers; ++worker) {
    const Candidate* from = all + worker * capacity;
    std::copy(from, from + sizes[worker], all + size);
    size += sizes[worker];
  }
  if (size > k) {
    std::nth_element(all, all + k, all + size, comes_before);
    size = k;
  }
  std::sort(all, all + size,
            [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
  for (int64_t i = 0; i < size; ++i) {
    indices[i] = all[i].index;
    if (sums != nullptr) sums[i] = all[i].sum;
  }
  return size;
}

void write_found(int64_t* found, int64_t count, const Flaw& flaw) {
  found[0] = count;
  found[1] = flaw.index;
  found[2] = static_cast<int64_t>(bits_of(flaw.importance));
}

int64_t select_top_workspace_bytes(const SelectionParams& p) {
  const Division division = division_of(p);
  return division.num_workers * division.capacity * static_cast<int64_t>(sizeof(Candidate));
}

Status select_top_cpu(const SelectionParams& p) {
  if (p.level < 0 || p.level > static_cast<int64_t>(best_cpu_level())) {
    return Status::kUnsupportedLevel;
  }
  const Importance importance{
      scan_of(static_cast<CpuLevel>(p.level), p.weight != 0, p.weight_dtype),
      static_cast<float>(p.num_examples)};
  if (importance.scan == nullptr) return Status::kUnknownDType;
  const Division division = division_of(p);
  std::vector<int64_t> sizes(division.num_workers, 0);
  std::vector<Flaw> flaws(division.num_workers);
  Job job{p, division, importance, sizes.data(), flaws.data(), {division.num_workers}};
  run_workers(division.num_workers, take_part, &job);
  Flaw flaw;
  for (const Flaw& each : flaws) {
    if (flaw.index < 0) flaw = each;
  }
  int64_t count = 0;
  if (flaw.index < 0) {
    count = join(reinterpret_cast<Candidate*>(p.workspace), division.capacity, sizes.data(),
                 division.num_workers, p.k, reinterpret_cast<int64_t*>(p.indices), nullptr);
  }
  write_found(reinterpret_cast<int64_t*>(p.found), count, flaw);
  return Status::kOk;
}

}  // namespace fastdean
