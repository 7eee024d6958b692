// gather_at, write_at and zero_at on CUDA: one launch for all tensors of a device. A block of the
// grid's y dimension takes a tensor, its threads along x take the indices; both walk on in strides
// when the grid is smaller.
#include <algorithm>

#include "fastdean.h"

namespace fastdean {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocksX = 1024;
constexpr int64_t kMaxBlocksY = 65535;  // the hardware's limit for this dimension

struct Gather {
  template <typename Bits>
  __device__ void operator()(Bits* place, Bits* values, int64_t i) const {
    values[i] = *place;
  }
};

struct Write {
  template <typename Bits>
  __device__ void operator()(Bits* place, Bits* values, int64_t i) const {
    *place = values[i];
  }
};

struct Zero {
  template <typename Bits>
  __device__ void operator()(Bits* place, Bits*, int64_t) const {
    *place = 0;
  }
};

template <typename Bits, typename Act>
__device__ void act_on_row(const PlacesRow& row, int64_t first, int64_t step, const Act& act) {
  auto* data = reinterpret_cast<Bits*>(row.data);
  auto* values = reinterpret_cast<Bits*>(row.values);
  const auto* indices = reinterpret_cast<const int64_t*>(row.indices);
  for (int64_t i = first; i < row.count; i += step) {
    act(data + element_offset(row, indices[i]), values, i);
  }
}

template <typename Act>
__global__ void places_kernel(PlacesParams params, Act act) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t r = blockIdx.y; r < params.num_rows; r += gridDim.y) {
    const PlacesRow& row = params.rows[r];
    switch (element_bytes(row.dtype)) {
      case 2:
        act_on_row<uint16_t>(row, first, step, act);
        break;
      case 4:
        act_on_row<uint32_t>(row, first, step, act);
        break;
      case 8:
        act_on_row<uint64_t>(row, first, step, act);
        break;
    }
  }
}

template <typename Act>
cudaError_t launch(const PlacesParams& params, const Act& act, cudaStream_t stream) {
  // An empty grid is a launch error in CUDA and a normal mask here.
  if (params.num_rows == 0 || params.max_count == 0) return cudaSuccess;
  const int64_t blocks_x = std::min((params.max_count + kThreads - 1) / kThreads, kMaxBlocksX);
  const int64_t blocks_y = std::min(params.num_rows, kMaxBlocksY);
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  places_kernel<<<grid, kThreads, 0, stream>>>(params, act);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather_at_cuda(const PlacesParams& params, cudaStream_t stream) {
  return launch(params, Gather{}, stream);
}

cudaError_t write_at_cuda(const PlacesParams& params, cudaStream_t stream) {
  return launch(params, Write{}, stream);
}

cudaError_t zero_at_cuda(const PlacesParams& params, cudaStream_t stream) {
  return launch(params, Zero{}, stream);
}

}  // namespace fastdean
