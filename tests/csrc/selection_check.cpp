// select_top_cpu at its levels, against a sort of all entries; compiled with the sanitizers, so that a
// read or write outside its memory, or undefined behaviour, ends it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fastdean.h"

namespace {

using fastdean::DType;

// Exactly as large as they must be: one element further is somebody else's memory.
struct Case {
  int64_t rows, columns, stride_r, stride_c, k;
};

// A case in memory with what is to be found in it, which every level and number of workers shares.
struct Problem {
  Case c;
  DType dtype;
  bool with_weight;
  std::vector<float> sums;
  std::vector<char> weight;
  std::vector<int64_t> expected;

  Problem(const Case& c, DType dtype, bool with_weight)
      : c(c), dtype(dtype), with_weight(with_weight) {
    const int64_t numel = c.rows * c.columns;
    const int64_t extent =
        numel == 0 ? 0 : (c.rows - 1) * c.stride_r + (c.columns - 1) * c.stride_c + 1;
    std::mt19937 random(7);
    sums.resize(extent);
    for (float& sum : sums) sum = static_cast<float>(random() % 5);
    const int64_t bytes = fastdean::element_bytes(static_cast<int64_t>(dtype));
    // Powers of two, whose bits are easily written in every type: -1, 2.
    const uint64_t one[] = {0xbc00, 0xbf80, 0xbf800000, 0xbff0000000000000};
    const uint64_t two[] = {0x4000, 0x4000, 0x40000000, 0x4000000000000000};
    weight.resize(extent * bytes);
    std::vector<float> magnitude(extent);
    for (int64_t i = 0; i < extent; ++i) {
      const bool is_two = random() % 2 == 0;
      std::memcpy(weight.data() + i * bytes, &(is_two ? two : one)[static_cast<int64_t>(dtype)],
                  bytes);
      magnitude[i] = !with_weight ? 1.0f : is_two ? 2.0f : 1.0f;
    }
    std::vector<std::pair<float, int64_t>> order;
    for (int64_t flat = 0; flat < numel; ++flat) {
      const int64_t at = flat / c.columns * c.stride_r + flat % c.columns * c.stride_c;
      const float value = sums[at] * magnitude[at] / 3.0f;
      if (value > 0) order.push_back({-value, flat});
    }
    std::sort(order.begin(), order.end());
    for (const auto& each : order) {
      if (static_cast<int64_t>(expected.size()) < c.k) expected.push_back(each.second);
    }
    std::sort(expected.begin(), expected.end());
  }
};

bool check(const Problem& problem, int64_t level, int64_t workers) {
  const Case& c = problem.c;
  std::vector<int64_t> indices(c.k), found(3);
  fastdean::SelectionParams p{};
  p.sums = reinterpret_cast<int64_t>(problem.sums.data());
  p.sums_stride_r = p.weight_stride_r = c.stride_r;
  p.sums_stride_c = p.weight_stride_c = c.stride_c;
  p.weight = problem.with_weight ? reinterpret_cast<int64_t>(problem.weight.data()) : 0;
  p.weight_dtype = static_cast<int64_t>(problem.dtype);
  p.rows = c.rows;
  p.columns = c.columns;
  p.num_examples = 3;
  p.k = c.k;
  p.indices = reinterpret_cast<int64_t>(indices.data());
  p.found = reinterpret_cast<int64_t>(found.data());
  p.level = level;
  p.num_workers = workers;
  std::vector<char> workspace(fastdean::select_top_workspace_bytes(p));
  p.workspace = reinterpret_cast<int64_t>(workspace.data());
  if (fastdean::select_top_cpu(p) != fastdean::Status::kOk || found[1] != -1) return false;
  indices.resize(found[0]);
  return indices == problem.expected;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 1},          {1, 65, 65, 1, 65},         {3, 200, 211, 1, 30},
      {13, 33, 1, 13, 429},     {2, 1500, 3001, 2, 7},      {1, 150000, 150000, 1, 9},
      {1, 150000, 1, 1, 70000}, {500, 300, 300, 1, 150000}, {4, 100, 100, 1, 0},
  };
  const auto best = static_cast<int64_t>(fastdean::best_cpu_level());
  int failures = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<Problem> problems = {{cases[i], DType::kFloat32, false}};
    for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      problems.emplace_back(cases[i], dtype, true);
    }
    for (const Problem& problem : problems) {
      for (int64_t level = 0; level <= best; ++level) {
        for (int64_t workers : {1, 3}) {
          if (check(problem, level, workers)) continue;
          std::printf("case %zu differs at level %lld\n", i, static_cast<long long>(level));
          ++failures;
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
