// Compiled with AVX512F; called only where the processor has it.
#include <immintrin.h>

#include "importance_tile.h"

namespace fastdean {
namespace {

struct Avx512 {
  using Element = float;
  using Sum = __m512;
  using Factor = __m512;
  // 24 sums, 2 columns and 1 row of 32 registers.
  static constexpr int kRows = 12, kRegisters = 2, kWidth = 16, kTokens = 1;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Factor load(const float* x) { return _mm512_load_ps(x); }
  static Factor broadcast(const float* g) { return _mm512_set1_ps(*g); }
  static Sum fma(Factor a, Factor b, Sum c) { return _mm512_fmadd_ps(a, b, c); }
  static void add_absolute(float* total, Sum part) {
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_abs_ps(part)));
  }
};

}  // namespace

TileKernel avx512_tile(Pack pack) { return tile_kernel<Avx512>(pack); }

}  // namespace fastdean
