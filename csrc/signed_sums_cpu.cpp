// Signed sums at single entries: sum_t g[t, r] x[t, c], without the sums of the others.
//
// A worker takes some of the entries, and a few tokens at a time for all of them: their rows of X and
// G stay in the cache then, and the entries are read in order.
#include <algorithm>
#include <vector>

#include "fastdean.h"
#include "floats.h"
#include "parallel.h"
#include "signed_sums.h"

namespace fastdean {
namespace {

constexpr int64_t kTokens = 8;  // at a time
// Starting a thread costs more than fewer products.
constexpr int64_t kLeastProducts = 1 << 18;

struct Entry {
  int64_t x_offset;
  int64_t g_offset;
  double sum;
};

struct Job {
  const SignedSums& asked;
  std::vector<Entry> entries;
  int64_t num_workers;
};

template <class T>
const T* row_of(const SignedSource& source, int64_t token) {
  const int64_t row = source.rows == nullptr ? token : source.rows[token];
  return reinterpret_cast<const T*>(source.data) + row * source.stride_t;
}

template <class T>
void add_tokens(const SignedSums& asked, int64_t first, int64_t tokens, Entry* entry, Entry* end) {
  const T* x[kTokens];
  const T* g[kTokens];
  for (int64_t i = 0; i < tokens; ++i) {
    x[i] = row_of<T>(asked.x, first + i);
    g[i] = row_of<T>(asked.g, first + i);
  }
  for (; entry < end; ++entry) {
    double sum = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      // The product of two numbers of fp32 is exact.
      sum += static_cast<double>(widen(x[i][entry->x_offset])) * widen(g[i][entry->g_offset]);
    }
    entry->sum += sum;
  }
}

template <class T>
void take_part(void* context, int64_t worker) {
  auto& job = *static_cast<Job*>(context);
  const SignedSums& asked = job.asked;
  const int64_t each = (asked.count + job.num_workers - 1) / job.num_workers;
  Entry* first = job.entries.data() + std::min(worker * each, asked.count);
  Entry* end = job.entries.data() + std::min((worker + 1) * each, asked.count);
  for (int64_t b = 0; b < asked.num_segments; ++b) {
    const int64_t last = asked.segments[2 * b + 1];
    for (int64_t t = asked.segments[2 * b]; t < last; t += kTokens) {
      add_tokens<T>(asked, t, std::min(kTokens, last - t), first, end);
    }
  }
}

void (*part_of(int64_t dtype))(void*, int64_t) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16:
      return &take_part<BFloat16>;
    case DType::kFloat16:
      return &take_part<Half>;
    default:
      return &take_part<float>;
  }
}

}  // namespace

void write_signed_sums(const SignedSums& asked, int64_t num_workers) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < asked.num_segments; ++b) {
    tokens += asked.segments[2 * b + 1] - asked.segments[2 * b];
  }
  const int64_t most = std::max<int64_t>(1, tokens * asked.count / kLeastProducts);
  Job job{asked, {}, std::min(most, std::max<int64_t>(1, num_workers))};
  job.entries.reserve(asked.count);
  for (int64_t i = 0; i < asked.count; ++i) {
    const int64_t index = asked.indices[i] - asked.first_index;
    const int64_t row = index / asked.columns, column = index % asked.columns;
    job.entries.push_back({column * asked.x.stride_w, row * asked.g.stride_w, 0.0});
  }
  run_workers(job.num_workers, part_of(asked.dtype), &job);
  for (int64_t i = 0; i < asked.count; ++i) {
    asked.result[i] = static_cast<float>(job.entries[i].sum);
  }
}

}  // namespace fastdean
