#pragma once

#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 half) { return emulated::from_bfloat16(half.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {emulated::to_bfloat16(value)}; }
