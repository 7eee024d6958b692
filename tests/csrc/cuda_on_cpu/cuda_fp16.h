#pragma once

#include "cuda_runtime_api.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half half) { return emulated::from_half(half.bits); }
inline __half __float2half_rn(float value) { return {emulated::to_half(value)}; }
