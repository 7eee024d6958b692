// The innermost loop of selection, once for every instruction set.
//
// Plain loops over groups, from which the compiler makes vector instructions: they wait for memory.
//
// Included by files for different instruction sets, so everything is in an unnamed namespace: the
// linker could take a shared symbol from another file.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "floats.h"
#include "selection_levels.h"

namespace fastdean {
namespace {

struct NoWeight {};

// |weight| of a group. A loop of its own: else compilers leave half precision to scalar instructions.
template <class W>
inline void read_magnitudes(const W* weight, int64_t count, float* magnitudes) {
  for (int64_t i = 0; i < count; ++i) {
    magnitudes[i] = std::fabs(static_cast<float>(widen(weight[i])));
  }
}

#ifdef __F16C__
inline void read_magnitudes(const Half* weight, int64_t count, float* magnitudes) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i));
    const __m256 wide = _mm256_cvtph_ps(half);
    _mm256_storeu_ps(magnitudes + i, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), wide));
  }
  for (; i < count; ++i) magnitudes[i] = std::fabs(widen(weight[i]));
}
#endif

// Positive numbers and their bits, read as integers, have the same order; those of negative numbers
// are negative, and reach nothing that is positive.
template <class W>
inline int32_t any_reaches(const float* sums, const W* weight, int64_t count, int32_t least,
                           float* products) {
  if constexpr (!std::is_same_v<W, NoWeight>) read_magnitudes(weight, count, products);
  int32_t reaches = 0;
  for (int64_t i = 0; i < count; ++i) {
    float product = sums[i];
    if constexpr (!std::is_same_v<W, NoWeight>) product *= products[i];
    const auto bits = static_cast<int32_t>(bits_of(product));
    reaches |= (bits >= least) | ((bits & 0x7fffffff) >= 0x7f800000);
    products[i] = product;
  }
  return reaches;
}

template <class W>
int64_t scan(const float* sums, const void* weights, int64_t first, int64_t end, float least,
             float* products) {
  const auto* weight = static_cast<const W*>(weights);
  const auto least_bits = static_cast<int32_t>(bits_of(least));
  for (; first + kGroup <= end; first += kGroup) {
    if (any_reaches(sums + first, weight + first, kGroup, least_bits, products)) return first;
  }
  const int64_t rest = end - first;
  if (rest > 0 && any_reaches(sums + first, weight + first, rest, least_bits, products)) {
    return first;
  }
  return end;
}

inline Scans scans() {
  return {{&scan<Half>, &scan<BFloat16>, &scan<float>, &scan<double>}, &scan<NoWeight>};
}

}  // namespace
}  // namespace fastdean
