// Compiled with AVX2 and FMA; called only where the processor has both.
#include <immintrin.h>

#include "importance_tile.h"

namespace fastdean {
namespace {

struct Avx2 {
  using Element = float;
  using Sum = __m256;
  using Factor = __m256;
  // 12 sums, 2 columns and 1 row of 16 registers; 12 sums also hide the latency of the FMA units.
  static constexpr int kRows = 6, kRegisters = 2, kWidth = 8, kTokens = 1;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Factor load(const float* x) { return _mm256_load_ps(x); }
  static Factor broadcast(const float* g) { return _mm256_broadcast_ss(g); }
  static Sum fma(Factor a, Factor b, Sum c) { return _mm256_fmadd_ps(a, b, c); }
  static void add_absolute(float* total, Sum part) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), _mm256_andnot_ps(sign, part)));
  }
};

}  // namespace

TileKernel avx2_tile(Pack pack) { return tile_kernel<Avx2>(pack); }

}  // namespace fastdean
