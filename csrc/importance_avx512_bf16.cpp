// Compiled with AVX512-BF16; called only where the processor has it, and for bf16 inputs.
#include <immintrin.h>

#include <cstring>

#include "importance_tile.h"

namespace fastdean {
namespace {

struct Avx512Bf16 {
  using Element = uint16_t;
  using Sum = __m512;
  using Factor = __m512bh;
  // As for AVX512; a step takes two tokens, whose products are added in fp32.
  static constexpr int kRows = 12, kRegisters = 2, kWidth = 16, kTokens = 2;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Factor load(const uint16_t* x) { return (__m512bh)_mm512_load_si512(x); }
  static Factor broadcast(const uint16_t* g) {
    int32_t pair;
    std::memcpy(&pair, g, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Sum fma(Factor a, Factor b, Sum c) { return _mm512_dpbf16_ps(c, a, b); }
  static void add_absolute(float* total, Sum part) {
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_abs_ps(part)));
  }
};

}  // namespace

TileKernel avx512_bf16_tile(Pack pack) { return tile_kernel<Avx512Bf16>(pack); }

}  // namespace fastdean
