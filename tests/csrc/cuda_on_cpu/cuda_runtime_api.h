// What the kernels of csrc/ use of CUDA, for a CPU: nothing here that they do not use.
//
// A kernel is an ordinary function, a launch runs it once for every thread (machine.h), and shared
// memory is static, because one block runs at a time.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "machine.h"

using cudaStream_t = struct CUstream_st*;
using dim3 = emulated::Size;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline cudaError_t cudaGetLastError() {
  return emulated::take_refusal() ? cudaErrorInvalidConfiguration : cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  std::memset(start, value, bytes);
  return cudaSuccess;
}

#ifdef __CUDACC__

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define blockDim (emulated::block_size())
#define gridDim (emulated::grid_size())

// The line tells one barrier from another: all threads must wait at the same.
#define __syncthreads() (emulated::block_barrier(__LINE__))
#define __shfl_xor_sync(mask, value, step) \
  (emulated::from_lane_xor((mask), (value), (step), __LINE__))

#define atomicExch(address, value) emulated::exchange_atomically((address), (value))

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline double max(double a, double b) { return std::fmax(a, b); }
using std::isnan;

#endif
