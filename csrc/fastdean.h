// The contract between Python and the compiled operations.
//
// Plain integers and pointers only: no torch and no Python here. The caller owns all memory, the
// tables included, and has checked every value that a function below does not say it checks.
#pragma once

#include <cstdint>

#ifdef FASTDEAN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fastdean {

// Raised by one with every change of a struct or a signature in this file; native.py names the
// number it was written for and refuses another.
constexpr int kAbiVersion = 1;

constexpr int kMaxRank = 8;

enum class DType : int64_t {
  kFloat16 = 0,
  kBFloat16 = 1,
  kFloat32 = 2,
  kFloat64 = 3,
};

enum class Status {
  kOk,
  kUnknownDType,
  kRankTooLarge,
  kIndexOutOfRange,
};

// One tensor of a zero_at call: one row of the table that Python writes as int64 [T, kRowFields].
// Every field has eight bytes so that the row has no padding.
struct ZeroAtRow {
  int64_t data;               // address of the element whose coordinates are all 0
  int64_t indices;            // address of int64 [count], row-major logical indices
  int64_t count;              // how many indices
  int64_t numel;              // how many elements the tensor has; indices lie in 0 .. numel - 1
  int64_t dtype;              // a DType
  int64_t rank;               // 0: contiguous, an index is an offset; else 1 .. kMaxRank
  int64_t sizes[kMaxRank];    // the first `rank` are the shape
  int64_t strides[kMaxRank];  // the first `rank` are the strides, in elements
};

constexpr int kRowFields = 6 + 2 * kMaxRank;
static_assert(sizeof(ZeroAtRow) == kRowFields * sizeof(int64_t), "a row must have no padding");

// zero_at: sets tensor[unravel(index)] = 0 for every index of every row.
struct ZeroAtParams {
  const ZeroAtRow* rows;  // [num_rows]; in host memory for the CPU, in device memory for CUDA
  int64_t num_rows;       // how many tensors
  int64_t max_count;      // the largest `count` of the rows; sizes the CUDA grid
};

// Zero is all bits clear in every DType, so a write needs the width of an element and no more.
// Returns 0 for a value that is no DType.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int element_bytes(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

// The offset, in elements, of a row-major logical index.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int64_t element_offset(const ZeroAtRow& row, int64_t index) {
  if (row.rank == 0) return index;
  int64_t offset = 0;
  for (int64_t dim = row.rank - 1; dim >= 0; --dim) {
    offset += (index % row.sizes[dim]) * row.strides[dim];
    index /= row.sizes[dim];
  }
  return offset;
}

// Checks dtype, rank and index range of every row, then writes; writes nothing unless kOk.
Status zero_at_cpu(const ZeroAtParams& params);

#ifdef FASTDEAN_WITH_CUDA
// Enqueues one kernel on `stream` of the current device. Checks nothing: the rows are not readable
// from the host.
cudaError_t zero_at_cuda(const ZeroAtParams& params, cudaStream_t stream);
#endif

}  // namespace fastdean
