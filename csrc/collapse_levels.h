// The loops over rows of the collapse-alignment loss, and the instruction sets they exist for.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// Ascending; all that this build has loops for. A newer processor takes the last one.
constexpr CpuLevel kCollapseLevels[] = {
    CpuLevel::kPortable,
#ifdef FASTDEAN_X86_LEVELS
    CpuLevel::kAvx2,
#endif
};

// Parts of a class's row, each at the first of `columns` elements. Its centred mean is
// sums * per_count - centre.
template <class T>
struct ClassRow {
  const T* sums;
  const T* centre;
  const void* weight;
  T per_count;  // 1 / count
};

struct Products {
  double both;    // weight . centred mean
  double weight;  // weight . weight
  double mean;    // centred mean . centred mean
};

template <class T>
struct FeatureLoops {
  // sum[columns] = the rows `order[0 .. count)` of `features`, added in this order. The rows of later
  // calls follow in `order`, `following` of them.
  void (*sum_rows)(T* sum, const void* features, int64_t stride, const int64_t* order,
                   int64_t count, int64_t following, int64_t columns);
  // out[columns] = row, rounded.
  void (*round_row)(void* out, const T* row, int64_t columns);
};

template <class T>
struct WeightLoops {
  Products (*products)(const ClassRow<T>& row, int64_t columns);
  // out = by_both * centred mean - by_weight * weight, rounded.
  void (*weight_gradient)(void* out, const ClassRow<T>& row, T by_both, T by_weight,
                          int64_t columns);
  // total += by_both * weight - by_mean * centred mean.
  void (*add_mean_gradient)(T* total, const ClassRow<T>& row, T by_both, T by_mean,
                            int64_t columns);
  // out = (by_both * weight - by_mean * centred mean - average) * per_count.
  void (*row_gradient)(T* out, const ClassRow<T>& row, const T* average, T by_both, T by_mean,
                       int64_t columns);
};

// All loops of one instruction set, computed in T. Features and weight are indexed by their DType;
// null where that type is not computed in T.
template <class T>
struct CollapseLoops {
  FeatureLoops<T> features[4];
  WeightLoops<T> weight[4];
  // sums = decay * old + batch, and total += sums * per_count; without those that are null.
  void (*join)(T* sums, const T* old, const T* batch, T* total, T decay, T per_count,
               int64_t columns);
  // The same where `old` is `sums`; with a decay of 1 and no batch nothing is written to them.
  void (*join_in_place)(T* sums, const T* batch, T* total, T decay, T per_count, int64_t columns);
};

// Defined by the file that is compiled for the level; x86-64 only.
void avx2_collapse_loops(CollapseLoops<float>* loops);
void avx2_collapse_loops(CollapseLoops<double>* loops);

}  // namespace fastdean
