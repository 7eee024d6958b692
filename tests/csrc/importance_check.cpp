// accumulate_importance_cpu at every level of this processor, against sums in double; compiled with
// the sanitizers, so that a read or write outside its memory, or undefined behaviour, ends it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fastdean.h"

namespace {

using fastdean::CpuLevel;
using fastdean::DType;

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Exactly as large as they must be: one element further is somebody else's memory.
struct Case {
  int64_t rows, columns, tokens;
  std::vector<int64_t> segments, expert_starts;
};

template <class T>
bool check(const Case& c, DType dtype, int64_t level, int64_t workers) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> x(c.tokens * c.columns), g(c.tokens * c.rows);
  std::vector<float> x_wide, g_wide;
  auto fill = [&](std::vector<T>& values, std::vector<float>& wide) {
    for (T& value : values) {
      if constexpr (sizeof(T) == 2) {
        value = to_bfloat16(normal(random));
        wide.push_back(from_bfloat16(value));
      } else {
        value = normal(random);
        wide.push_back(value);
      }
    }
  };
  fill(x, x_wide);
  fill(g, g_wide);
  const auto experts = static_cast<int64_t>(c.expert_starts.size()) - 1;
  std::vector<float> acc(experts * c.rows * c.columns, 0.5f);
  fastdean::ImportanceParams p{};
  p.acc = reinterpret_cast<int64_t>(acc.data());
  p.acc_stride_e = c.rows * c.columns;
  p.acc_stride_r = c.columns;
  p.acc_stride_c = 1;
  p.x = reinterpret_cast<int64_t>(x.data());
  p.x_stride_t = c.columns;
  p.x_stride_c = 1;
  p.g = reinterpret_cast<int64_t>(g.data());
  p.g_stride_t = c.rows;
  p.g_stride_r = 1;
  p.dtype = static_cast<int64_t>(dtype);
  p.experts = experts;
  p.rows = c.rows;
  p.columns = c.columns;
  p.tokens = c.tokens;
  p.segments = reinterpret_cast<int64_t>(c.segments.data());
  p.expert_starts = reinterpret_cast<int64_t>(c.expert_starts.data());
  p.level = level;
  p.num_workers = workers;
  std::vector<char> workspace(fastdean::accumulate_importance_workspace_bytes(p));
  p.workspace = reinterpret_cast<int64_t>(workspace.data());
  if (fastdean::accumulate_importance_cpu(p) != fastdean::Status::kOk) return false;
  for (int64_t i = 0; i < experts * c.rows * c.columns; ++i) {
    const int64_t e = i / (c.rows * c.columns);
    const int64_t r = i / c.columns % c.rows, k = i % c.columns;
    double expected = 0.5, scale = 0.5;
    for (int64_t b = c.expert_starts[e]; b < c.expert_starts[e + 1]; ++b) {
      double sum = 0;
      for (int64_t t = c.segments[2 * b]; t < c.segments[2 * b + 1]; ++t) {
        const double product = double(g_wide[t * c.rows + r]) * x_wide[t * c.columns + k];
        sum += product;
        scale += std::fabs(product);
      }
      expected += std::fabs(sum);
    }
    if (!(std::fabs(acc[i] - expected) <= 1e-5 * scale)) return false;
  }
  return true;
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {1, 1, 1, {0, 1}, {0, 1}},
      {13, 33, 37, {2, 3, 10, 21, 5, 5, 3, 10, 0, 37}, {0, 5}},
      {7, 17, 900, {0, 500, 500, 501, 501, 900}, {0, 3}},
      {5, 4, 3, {}, {0, 0}},
      // Four experts, the first and the third without an example.
      {13, 33, 37, {2, 3, 10, 21, 5, 5, 3, 10, 0, 37}, {0, 0, 4, 4, 5}},
  };
  int failures = 0;
  for (int64_t level = 0; level <= static_cast<int64_t>(fastdean::best_cpu_level()); ++level) {
    for (int64_t workers : {1, 3}) {
      for (size_t i = 0; i < cases.size(); ++i) {
        const bool fp32 = check<float>(cases[i], DType::kFloat32, level, workers);
        const bool bf16 = check<uint16_t>(cases[i], DType::kBFloat16, level, workers);
        if (!fp32 || !bf16) {
          std::printf("case %zu differs at level %lld\n", i, static_cast<long long>(level));
          ++failures;
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
