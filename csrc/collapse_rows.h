// The loops over rows of the collapse-alignment loss, once for every instruction set.
//
// Included by files for different instruction sets, so everything is in an unnamed namespace: the
// linker could take a shared symbol from another file.
#pragma once

#include <algorithm>
#include <cstdint>

#include "collapse_levels.h"
#include "fastdean.h"
#include "floats.h"

namespace fastdean {
namespace {

// Several sums side by side, so that a product over a row is not one chain of additions.
template <class T>
struct Lanes {
  static constexpr int kCount = 128 / sizeof(T);
  T values[kCount] = {};

  double total() const {
    double sum = 0;
    for (const T value : values) sum += static_cast<double>(value);
    return sum;
  }
};

// Rows lie anywhere, and a processor by itself only prefetches memory in order.
template <class F>
void prefetch(const F* row, int64_t columns) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64 / sizeof(F);
  for (int64_t j = 0; j < columns; j += kLine) __builtin_prefetch(row + j);
#else
  (void)row;
  (void)columns;
#endif
}

template <class T, class F>
void sum_rows(T* __restrict sum, const void* features, int64_t stride, const int64_t* order,
              int64_t count, int64_t following, int64_t columns) {
  const auto* data = static_cast<const F*>(features);
  std::fill(sum, sum + columns, T(0));
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const F* __restrict a = data + order[i] * stride;
    const F* __restrict b = data + order[i + 1] * stride;
    const F* __restrict c = data + order[i + 2] * stride;
    const F* __restrict d = data + order[i + 3] * stride;
    for (int64_t j = 0; j < columns; ++j) {
      sum[j] = (((sum[j] + widen(a[j])) + widen(b[j])) + widen(c[j])) + widen(d[j]);
    }
  }
  for (; i < count; ++i) {
    // Four rows at a time keep enough reads under way; single rows need prefetching.
    constexpr int64_t kAhead = 2;
    if (i + kAhead < count + following) prefetch(data + order[i + kAhead] * stride, columns);
    const F* __restrict row = data + order[i] * stride;
    for (int64_t j = 0; j < columns; ++j) sum[j] += widen(row[j]);
  }
}

template <class T, class F>
void round_row(void* out, const T* row, int64_t columns) {
  auto* rounded = static_cast<F*>(out);
  for (int64_t j = 0; j < columns; ++j) narrow(row[j], rounded[j]);
}

template <class T>
void add_scaled(T* __restrict total, const T* __restrict sums, T per_count, int64_t columns) {
  if (total == nullptr) return;
  for (int64_t j = 0; j < columns; ++j) total[j] += sums[j] * per_count;
}

template <class T>
void join(T* __restrict sums, const T* __restrict old, const T* __restrict batch,
          T* __restrict total, T decay, T per_count, int64_t columns) {
  if (old != nullptr && batch != nullptr) {
    for (int64_t j = 0; j < columns; ++j) sums[j] = decay * old[j] + batch[j];
  } else if (old != nullptr) {
    for (int64_t j = 0; j < columns; ++j) sums[j] = decay * old[j];
  } else if (batch != nullptr) {
    std::copy(batch, batch + columns, sums);
  } else {
    std::fill(sums, sums + columns, T(0));
  }
  add_scaled(total, sums, per_count, columns);
}

template <class T>
void join_in_place(T* __restrict sums, const T* __restrict batch, T* __restrict total, T decay,
                   T per_count, int64_t columns) {
  if (batch != nullptr) {
    for (int64_t j = 0; j < columns; ++j) sums[j] = decay * sums[j] + batch[j];
  } else if (decay != T(1)) {
    for (int64_t j = 0; j < columns; ++j) sums[j] = decay * sums[j];
  }
  add_scaled(total, sums, per_count, columns);
}

template <class T>
T centred(const ClassRow<T>& row, int64_t j) {
  return row.sums[j] * row.per_count - row.centre[j];
}

template <class T, class W>
Products products(const ClassRow<T>& row, int64_t columns) {
  constexpr int kLanes = Lanes<T>::kCount;
  const auto* __restrict weight = static_cast<const W*>(row.weight);
  const T* __restrict sums = row.sums;
  const T* __restrict centre = row.centre;
  const T per_count = row.per_count;
  Lanes<T> both, weights, means;
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const T w = widen(weight[j + k]);
      const T m = sums[j + k] * per_count - centre[j + k];
      both.values[k] += w * m;
      weights.values[k] += w * w;
      means.values[k] += m * m;
    }
  }
  for (int k = 0; j < columns; ++j, ++k) {
    const T w = widen(weight[j]), m = centred(row, j);
    both.values[k] += w * m;
    weights.values[k] += w * w;
    means.values[k] += m * m;
  }
  return {both.total(), weights.total(), means.total()};
}

template <class T, class W>
void weight_gradient(void* out, const ClassRow<T>& row, T by_both, T by_weight, int64_t columns) {
  const auto* __restrict weight = static_cast<const W*>(row.weight);
  const T* __restrict sums = row.sums;
  const T* __restrict centre = row.centre;
  const T per_count = row.per_count;
  auto* __restrict gradient = static_cast<W*>(out);
  for (int64_t j = 0; j < columns; ++j) {
    const T m = sums[j] * per_count - centre[j];
    narrow(by_both * m - by_weight * widen(weight[j]), gradient[j]);
  }
}

template <class T, class W>
void add_mean_gradient(T* __restrict total, const ClassRow<T>& row, T by_both, T by_mean,
                       int64_t columns) {
  const auto* __restrict weight = static_cast<const W*>(row.weight);
  const T* __restrict sums = row.sums;
  const T* __restrict centre = row.centre;
  const T per_count = row.per_count;
  for (int64_t j = 0; j < columns; ++j) {
    const T m = sums[j] * per_count - centre[j];
    total[j] += by_both * widen(weight[j]) - by_mean * m;
  }
}

template <class T, class W>
void row_gradient(T* __restrict out, const ClassRow<T>& row, const T* __restrict average, T by_both,
                  T by_mean, int64_t columns) {
  const auto* __restrict weight = static_cast<const W*>(row.weight);
  const T* __restrict sums = row.sums;
  const T* __restrict centre = row.centre;
  const T per_count = row.per_count;
  for (int64_t j = 0; j < columns; ++j) {
    const T m = sums[j] * per_count - centre[j];
    out[j] = (by_both * widen(weight[j]) - by_mean * m - average[j]) * per_count;
  }
}

template <class T, class F>
void set_loops(CollapseLoops<T>* loops, DType dtype) {
  const auto index = static_cast<int64_t>(dtype);
  loops->features[index] = {&sum_rows<T, F>, &round_row<T, F>};
  loops->weight[index] = {&products<T, F>, &weight_gradient<T, F>, &add_mean_gradient<T, F>,
                          &row_gradient<T, F>};
}

inline void set_all_loops(CollapseLoops<float>* loops) {
  *loops = {};
  loops->join = &join<float>;
  loops->join_in_place = &join_in_place<float>;
  set_loops<float, Half>(loops, DType::kFloat16);
  set_loops<float, BFloat16>(loops, DType::kBFloat16);
  set_loops<float, float>(loops, DType::kFloat32);
}

inline void set_all_loops(CollapseLoops<double>* loops) {
  *loops = {};
  loops->join = &join<double>;
  loops->join_in_place = &join_in_place<double>;
  set_loops<double, double>(loops, DType::kFloat64);
}

}  // namespace
}  // namespace fastdean
