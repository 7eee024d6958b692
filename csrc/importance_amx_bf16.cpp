// Compiled with AVX512F and AMX; called only where the processor has both, the system grants the
// matrix unit, and for bf16 inputs.
//
// A tile is 32 x 32: four of the unit's registers hold the products of one example, four its inputs,
// 16 rows or columns of 32 tokens each. The unit cannot take absolute values: at an example's end its
// registers are stored, and the vector units add them to `total` while the unit multiplies the next
// example. It treats denormals as 0 and rounds to nearest, whatever the thread's settings.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "importance_tile.h"

namespace fastdean {
namespace {

constexpr int64_t kSide = 32;        // rows and columns of a tile
constexpr int64_t kStepTokens = 32;  // of one product of the unit
constexpr int64_t kRegisterRows = 16;
constexpr int64_t kRowBytes = 64;
constexpr int64_t kRegisterBytes = kRegisterRows * kRowBytes;

// GCC 12 takes the forms without a mask for reads of what was never written (its bug 105593).
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask8 kAll64 = 0xff;

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

constexpr TileConfig every_register() {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kRowBytes;
    config.rows[i] = kRegisterRows;
  }
  return config;
}

// In constant memory: GCC 12 thinks that the instruction reads no more than the first eight bytes,
// and would not write the others.
constexpr TileConfig kEveryRegister = every_register();

void enter() { _tile_loadconfig(&kEveryRegister); }

void leave() { _tile_release(); }

// The next up to 32 tokens of 16 columns, in pairs: lane w of vector i holds tokens 2 i and 2 i + 1 of
// column w, or 0 beyond the last.
struct Pairs {
  __m512i of[kRegisterRows];
};

// `data`: the first of the columns at row 0; `left`: how many there are from it on.
Pairs pairs_of(const PanelSource& source, const uint16_t* data, int64_t left, int64_t first,
               int64_t tokens) {
  Pairs pairs;
  if (source.stride_w == 1 && left >= kRegisterRows) {
    for (int64_t i = 0; i < kRegisterRows; ++i) {
      __m512i pair = _mm512_setzero_si512();
      if (2 * i < tokens) {
        const auto* row = reinterpret_cast<const __m256i*>(data + source.offset_of(first + 2 * i));
        pair = _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(row));
      }
      if (2 * i + 1 < tokens) {
        const auto* next =
            reinterpret_cast<const __m256i*>(data + source.offset_of(first + 2 * i + 1));
        const __m512i high = _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(next));
        pair = _mm512_or_si512(pair, _mm512_maskz_slli_epi32(kAll, high, 16));
      }
      pairs.of[i] = pair;
    }
    return pairs;
  }
  alignas(64) uint16_t values[kRegisterRows][kRegisterRows][2] = {};
  for (int64_t t = 0; t < std::min(tokens, kStepTokens); ++t) {
    const uint16_t* row = data + source.offset_of(first + t);
    for (int64_t w = 0; w < std::min(left, kRegisterRows); ++w) {
      values[t / 2][w][t % 2] = row[w * source.stride_w];
    }
  }
  for (int64_t i = 0; i < kRegisterRows; ++i) pairs.of[i] = _mm512_load_si512(values[i]);
  return pairs;
}

// Lane i of vector j changes places with lane j of vector i.
Pairs transposed(const Pairs& rows) {
  Pairs a, b;
  for (int i = 0; i < 16; i += 2) {
    a.of[i] = _mm512_maskz_unpacklo_epi32(kAll, rows.of[i], rows.of[i + 1]);
    a.of[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, rows.of[i], rows.of[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b.of[i + 2 * j] = _mm512_maskz_unpacklo_epi64(kAll64, a.of[i + j], a.of[i + j + 2]);
      b.of[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(kAll64, a.of[i + j], a.of[i + j + 2]);
    }
  }
  // Vector i of b holds, in its 128-bit lane q, column 4 q + i % 4 of rows i - i % 4 to + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_maskz_shuffle_i32x4(kAll, b.of[i], b.of[i + 4], 0x88);
    const __m512i high = _mm512_maskz_shuffle_i32x4(kAll, b.of[i], b.of[i + 4], 0xdd);
    const __m512i low2 = _mm512_maskz_shuffle_i32x4(kAll, b.of[i + 8], b.of[i + 12], 0x88);
    const __m512i high2 = _mm512_maskz_shuffle_i32x4(kAll, b.of[i + 8], b.of[i + 12], 0xdd);
    a.of[i] = _mm512_maskz_shuffle_i32x4(kAll, low, low2, 0x88);
    a.of[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, low, low2, 0xdd);
    a.of[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, high, high2, 0x88);
    a.of[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, high, high2, 0xdd);
  }
  return a;
}

// Panels [steps, 2] of registers: [16 columns, 32 tokens] of G, [16 pairs of tokens, 16 columns, 2]
// of X.
template <bool of_g>
void pack(const PanelSource& source, int64_t wide, void* panel) {
  auto* to = static_cast<char*>(panel);
  const auto* data = static_cast<const uint16_t*>(source.data);
  for (int64_t b = 0; b < source.num_examples; ++b) {
    const int64_t end = source.segments[2 * b + 1];
    for (int64_t t = source.segments[2 * b]; t < end; t += kStepTokens) {
      for (int64_t w = 0; w < wide; w += kRegisterRows) {
        const Pairs pairs =
            pairs_of(source, data + w * source.stride_w, source.columns - w, t, end - t);
        const Pairs rows = of_g ? transposed(pairs) : pairs;
        for (int64_t i = 0; i < kRegisterRows; ++i) {
          _mm512_store_si512(to + i * kRowBytes, rows.of[i]);
        }
        to += kRegisterBytes;
      }
    }
  }
}

// Products of one example, [row half, column half] of registers.
using Parts = float[2][2][kRegisterRows][kRegisterRows];

void add_absolute(float* total, const Parts& parts) {
  for (int64_t i = 0; i < kSide; ++i) {
    for (int64_t j = 0; j < 2; ++j) {
      float* to = total + i * kSide + j * kRegisterRows;
      const __m512 part = _mm512_load_ps(parts[i / kRegisterRows][j][i % kRegisterRows]);
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_abs_ps(part)));
    }
  }
}

void run(const void* g_panel, const void* x_panel, const int64_t* steps, int64_t num_examples,
         float* total) {
  const auto* g = static_cast<const char*>(g_panel);
  const auto* x = static_cast<const char*>(x_panel);
  alignas(64) Parts parts;
  std::memset(total, 0, kSide * kSide * sizeof(float));
  bool waiting = false;
  for (int64_t b = 0; b < num_examples; ++b) {
    if (steps[b] == 0) continue;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps[b]; ++step) {
      _tile_loadd(4, g, kRowBytes);
      _tile_loadd(6, x, kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, x + kRegisterBytes, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, g + kRegisterBytes, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      g += 2 * kRegisterBytes;
      x += 2 * kRegisterBytes;
    }
    if (waiting) add_absolute(total, parts);
    _tile_stored(0, parts[0][0], kRowBytes);
    _tile_stored(1, parts[0][1], kRowBytes);
    _tile_stored(2, parts[1][0], kRowBytes);
    _tile_stored(3, parts[1][1], kRowBytes);
    waiting = true;
  }
  if (waiting) add_absolute(total, parts);
}

void add(const float* total, float* acc, int64_t stride_r, int64_t height, int64_t width) {
  add_tile(total, acc, stride_r, height, width, kSide);
}

}  // namespace

TileKernel amx_bf16_tile() {
  TileKernel kernel{};
  kernel.rows = kernel.columns = kSide;
  kernel.tokens = kStepTokens;
  kernel.bytes = sizeof(uint16_t);
  // The accumulator's bytes take longer than the products of a few hundred tokens.
  kernel.chunk_tokens = 1024;
  kernel.block_bytes = 768 * 1024;
  kernel.pack_g = &pack<true>;
  kernel.pack_x = &pack<false>;
  kernel.enter = &enter;
  kernel.leave = &leave;
  kernel.run = &run;
  kernel.add = &add;
  return kernel;
}

bool amx_bf16_granted() {
  // Of the kernel's asm/prctl.h and of the order of processor states.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = [] {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

}  // namespace fastdean
