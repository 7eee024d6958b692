// zero_at on CUDA: one launch for all tensors of a device. A block of the grid's y dimension takes
// a tensor, its threads along x take the indices; both walk on in strides when the grid is smaller.
#include <algorithm>

#include "fastdean.h"

namespace fastdean {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocksX = 1024;
constexpr int64_t kMaxBlocksY = 65535;  // the hardware's limit for this dimension

__device__ void zero_element(int64_t data, int64_t offset, int bytes) {
  switch (bytes) {
    case 2:
      reinterpret_cast<uint16_t*>(data)[offset] = 0;
      break;
    case 4:
      reinterpret_cast<uint32_t*>(data)[offset] = 0;
      break;
    case 8:
      reinterpret_cast<uint64_t*>(data)[offset] = 0;
      break;
  }
}

__global__ void zero_at_kernel(ZeroAtParams params) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t r = blockIdx.y; r < params.num_rows; r += gridDim.y) {
    const ZeroAtRow& row = params.rows[r];
    const auto* indices = reinterpret_cast<const int64_t*>(row.indices);
    const int bytes = element_bytes(row.dtype);
    for (int64_t i = first; i < row.count; i += step) {
      zero_element(row.data, element_offset(row, indices[i]), bytes);
    }
  }
}

}  // namespace

cudaError_t zero_at_cuda(const ZeroAtParams& params, cudaStream_t stream) {
  // An empty grid is a launch error in CUDA and a normal mask here.
  if (params.num_rows == 0 || params.max_count == 0) return cudaSuccess;
  const int64_t blocks_x = std::min((params.max_count + kThreads - 1) / kThreads, kMaxBlocksX);
  const int64_t blocks_y = std::min(params.num_rows, kMaxBlocksY);
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  zero_at_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace fastdean
