// Element types as they lie in memory, and the type that is computed in: float for all but double.
//
// No branches, so that a loop over these becomes vector instructions. In an unnamed namespace,
// because files compiled for different instruction sets include it.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdean {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t rest = value.bits & 0x7fffu;
  const uint32_t bias = rest >= 0x7c00u ? 0x70000000u : 0x38000000u;
  // Zero or denormal: an integer multiple of 2^-24.
  const uint32_t small =
      bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 5.9604644775390625e-8f);
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return float_of((rest < 0x0400u ? small : (rest << 13) + bias) | sign);
}

// To the nearest, ties to even.
inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void narrow(float value, Half& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rest = bits & 0x7fffffffu;
  const uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // The sum's last place is 2^-24, that of a denormal; adding rounds to it.
  const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - 0x38000000u + 0x0fffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t value_bits = rest >= 0x47800000u ? large : rest < 0x38800000u ? small : normal;
  out.bits = static_cast<uint16_t>(value_bits | ((bits >> 16) & 0x8000u));
}

}  // namespace
}  // namespace fastdean
