// select_importance_cpu at every level of this processor, against accumulate_importance_cpu and
// select_top_cpu; compiled with the sanitizers, so that a read or write outside its memory, or
// undefined behaviour, ends it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fastdean.h"

namespace {

using fastdean::DType;

int64_t address(const void* data) { return reinterpret_cast<int64_t>(data); }

float value_of(float value) { return value; }
float value_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Exactly as large as they must be: one element further is somebody else's memory. `rows_of_x`: of
// each token; empty: its own number. `batches`: of each example; empty: one for all.
struct Case {
  int64_t experts, rows, columns, tokens;
  std::vector<int64_t> segments, group_starts, ks, rows_of_x, batches;
};

template <class T>
bool check(const Case& c, DType dtype, int64_t level, int64_t workers) {
  std::mt19937 random(7);
  const auto filled = [&](int64_t size) {
    std::vector<T> values(size);
    for (T& value : values) {
      // Whole numbers from -2 to 2, as bf16 or fp32.
      constexpr uint16_t kBits[] = {0xc000, 0xbf80, 0, 0x3f80, 0x4000};
      const int64_t number = random() % 5;
      value = sizeof(T) == 2 ? static_cast<T>(kBits[number]) : static_cast<T>(number - 2);
    }
    return values;
  };
  int64_t x_size = c.rows_of_x.empty() ? c.tokens : 0;
  for (const int64_t row : c.rows_of_x) x_size = std::max(x_size, row + 1);
  const std::vector<T> x = filled(x_size * c.columns), g = filled(c.tokens * c.rows);
  const std::vector<T> weight = filled(c.experts * c.rows * c.columns);
  // What the fused operation reads by rows, in order.
  std::vector<T> ordered;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const int64_t row = c.rows_of_x.empty() ? t : c.rows_of_x[t];
    ordered.insert(ordered.end(), x.begin() + row * c.columns, x.begin() + (row + 1) * c.columns);
  }
  const auto sets = static_cast<int64_t>(c.ks.size());
  int64_t all = 0;
  for (const int64_t k : c.ks) all += c.experts * k;
  std::vector<int64_t> indices(all), found(3 * sets * c.experts), num_examples(sets);
  for (int64_t set = 0; set < sets; ++set) num_examples[set] = set + 2;
  std::vector<float> sums(all), signed_sums(all);
  fastdean::ImportanceSelectionParams p{};
  p.x = address(x.data());
  p.x_stride_t = c.columns;
  p.x_stride_c = 1;
  p.x_rows = c.rows_of_x.empty() ? 0 : address(c.rows_of_x.data());
  p.g = address(g.data());
  p.g_stride_t = c.rows;
  p.g_stride_r = 1;
  p.dtype = p.weight_dtype = static_cast<int64_t>(dtype);
  p.weight = address(weight.data());
  p.weight_stride_e = c.rows * c.columns;
  p.weight_stride_r = c.columns;
  p.experts = c.experts;
  p.rows = c.rows;
  p.columns = c.columns;
  p.tokens = c.tokens;
  p.segments = address(c.segments.data());
  p.group_starts = address(c.group_starts.data());
  p.batches = c.batches.empty() ? 0 : address(c.batches.data());
  p.ks = address(c.ks.data());
  p.num_examples = address(num_examples.data());
  p.num_sets = sets;
  p.indices = address(indices.data());
  p.sums = address(sums.data());
  p.signed_sums = address(signed_sums.data());
  p.found = address(found.data());
  p.level = level;
  p.num_workers = workers;
  std::vector<char> workspace(fastdean::select_importance_workspace_bytes(p));
  p.workspace = address(workspace.data());
  if (fastdean::select_importance_cpu(p) != fastdean::Status::kOk) return false;
  int64_t offset = 0;
  for (int64_t group = 0; group < c.experts * sets; ++group) {
    const int64_t set = group % sets, first_index = group / sets * c.rows * c.columns;
    std::vector<float> acc(c.rows * c.columns, 0.0f);
    const int64_t expert_starts[] = {c.group_starts[group], c.group_starts[group + 1]};
    fastdean::ImportanceParams a{};
    a.acc = address(acc.data());
    a.experts = 1;
    a.acc_stride_r = c.columns;
    a.acc_stride_c = 1;
    a.x = address(ordered.data());
    a.x_stride_t = p.x_stride_t;
    a.x_stride_c = 1;
    a.g = p.g;
    a.g_stride_t = p.g_stride_t;
    a.g_stride_r = 1;
    a.dtype = p.dtype;
    a.rows = c.rows;
    a.columns = c.columns;
    a.tokens = c.tokens;
    a.segments = p.segments;
    a.level = level;
    a.num_workers = 1;
    for (int64_t first = expert_starts[0]; first < expert_starts[1];) {
      int64_t end = c.batches.empty() ? expert_starts[1] : first + 1;
      while (end < expert_starts[1] && c.batches[end] == c.batches[first]) ++end;
      const int64_t batch_starts[] = {first, end};
      a.expert_starts = address(batch_starts);
      std::vector<char> room(fastdean::accumulate_importance_workspace_bytes(a));
      a.workspace = address(room.data());
      if (fastdean::accumulate_importance_cpu(a) != fastdean::Status::kOk) return false;
      first = end;
    }
    std::vector<int64_t> expected(c.ks[set]), count(3);
    fastdean::SelectionParams s{};
    s.sums = a.acc;
    s.weight = address(weight.data() + first_index);
    s.sums_stride_r = s.weight_stride_r = c.columns;
    s.sums_stride_c = s.weight_stride_c = 1;
    s.weight_dtype = p.weight_dtype;
    s.rows = c.rows;
    s.columns = c.columns;
    s.num_examples = num_examples[set];
    s.k = c.ks[set];
    s.indices = address(expected.data());
    s.found = address(count.data());
    s.level = level;
    s.num_workers = 1;
    std::vector<char> more(fastdean::select_top_workspace_bytes(s));
    s.workspace = address(more.data());
    if (fastdean::select_top_cpu(s) != fastdean::Status::kOk) return false;
    if (found[3 * group] != count[0] || found[3 * group + 1] != -1) return false;
    for (int64_t i = 0; i < count[0]; ++i) {
      if (indices[offset + i] != first_index + expected[i]) return false;
      if (sums[offset + i] != acc[expected[i]]) return false;
      double sum = 0;
      for (int64_t b = expert_starts[0]; b < expert_starts[1]; ++b) {
        for (int64_t t = c.segments[2 * b]; t < c.segments[2 * b + 1]; ++t) {
          sum += double(value_of(g[t * c.rows + expected[i] / c.columns])) *
                 value_of(ordered[t * c.columns + expected[i] % c.columns]);
        }
      }
      if (signed_sums[offset + i] != sum) return false;
    }
    offset += c.ks[set];
  }
  return true;
}

}  // namespace

int main() {
  std::vector<int64_t> shared;
  for (int64_t t = 0; t < 37; ++t) shared.push_back(t * 7 % 20);
  const std::vector<int64_t> ragged = {2, 3, 10, 21, 5, 5, 3, 10, 0, 37};
  const std::vector<Case> cases = {
      {1, 1, 1, 1, {0, 1}, {0, 1}, {1}, {}, {}},
      {1, 13, 33, 37, ragged, {0, 3, 3, 5}, {4, 9, 429}, {}, {}},
      {1, 13, 33, 37, ragged, {0, 3, 3, 5}, {4, 9, 429}, {}, {2, 2, 7, 2, 7}},
      {1, 70, 65, 900, {0, 500, 500, 501, 501, 900}, {0, 2, 3}, {0, 200}, {}, {}},
      {1, 5, 4, 3, {}, {0, 0}, {3}, {}, {}},
      // Three experts, the second without an example; tokens that share rows of x.
      {3, 13, 33, 37, ragged, {0, 1, 3, 3, 3, 3, 5}, {4, 429}, shared, {}},
      {3, 13, 33, 37, ragged, {0, 1, 3, 3, 3, 3, 5}, {4, 429}, shared, {0, 0, 1, 0, 1}},
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
