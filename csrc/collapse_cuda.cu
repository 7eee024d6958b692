// The collapse-alignment loss and its backward on CUDA, without atomic sums: every sum has one order,
// which depends on sizes alone.
//
// Forward: the labelled rows are sorted by class with a stable counting sort (rank_rows, add_chunks,
// scan_classes, place_rows); join_sums adds each class's rows and part of the centre; average ends
// the centre; multiply gives each class's products with its weight, finish the loss and the factors
// of the backward. Backward: weight_gradients, then average and row_gradients for the features.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "fastdean.h"

namespace fastdean {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;
// Rows are ranked within a chunk; a chunk's counts take 4 bytes per class.
constexpr int64_t kMostChunks = 64;
// Classes that one block takes one after the other, where there are enough blocks for all
// multiprocessors without.
constexpr int64_t kMostGroupClasses = 32;
constexpr int64_t kEnoughBlocks = 1024;
constexpr int64_t kAlignment = 256;
// average: columns and partial rows side by side in a block.
constexpr int kAverageColumns = 32;
constexpr int kAverageRows = 32;
constexpr int kAverageThreads = kAverageColumns * kAverageRows;
// In place of a weight's squared length: the class has no cosine, and so no gradient.
constexpr double kNoCosine = -1;

__host__ __device__ int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

__device__ float widen(float value) { return value; }
__device__ double widen(double value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ void narrow(float value, float& out) { out = value; }
__device__ void narrow(double value, double& out) { out = value; }
__device__ void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// What kernels need of the parameters, and where in the workspace the rest lies.
struct Plan {
  CollapseParams p;
  double decay;
  int64_t chunks;
  int64_t chunk_rows;  // a multiple of kThreads
  int64_t groups;      // of classes
  int64_t group_classes;
  int32_t* out_of_range;  // not 0 if a label was
  int32_t* table;         // [chunks, classes]: rows of a class in a chunk, later in earlier chunks
  int32_t* ranks;         // [rows]: rows of the same class before this one in its chunk
  int64_t* starts;        // [classes + 1]: first of each class in `order`
  int64_t* order;         // [rows]: the labelled rows by class
  double* products;       // [3, classes]: cosine, squared lengths of weight and centred mean
  void* partial;          // T [groups, columns]
  void* average;          // T [columns]
  int64_t cleared_bytes;  // of the workspace's start that must be 0
  int64_t bytes;
};

// With null addresses where `p.workspace` is 0.
Plan plan_of(const CollapseParams& p) {
  Plan plan{};
  plan.p = p;
  plan.chunk_rows =
      divide_up(divide_up(std::max<int64_t>(p.rows, 1), kMostChunks), kThreads) * kThreads;
  plan.chunks = std::max<int64_t>(1, divide_up(p.rows, plan.chunk_rows));
  const int64_t blocks = p.classes * divide_up(p.columns, kThreads);
  plan.group_classes = std::clamp<int64_t>(blocks / kEnoughBlocks, 1, kMostGroupClasses);
  plan.groups = divide_up(p.classes, plan.group_classes);

  const int64_t element = element_bytes(p.sums_dtype);
  int64_t end = 0;
  const auto take = [&end, &p](int64_t bytes) {
    const int64_t start = end;
    end += divide_up(bytes, kAlignment) * kAlignment;
    return p.workspace + start;
  };
  plan.out_of_range = reinterpret_cast<int32_t*>(take(4));
  plan.table = reinterpret_cast<int32_t*>(take(plan.chunks * p.classes * 4));
  plan.cleared_bytes = end;
  plan.ranks = reinterpret_cast<int32_t*>(take(p.rows * 4));
  plan.starts = reinterpret_cast<int64_t*>(take((p.classes + 1) * 8));
  plan.order = reinterpret_cast<int64_t*>(take(p.rows * 8));
  plan.products = reinterpret_cast<double*>(take(3 * p.classes * 8));
  plan.partial = reinterpret_cast<void*>(take(plan.groups * p.columns * element));
  plan.average = reinterpret_cast<void*>(take(p.columns * element));
  plan.bytes = end;
  return plan;
}

__device__ int64_t label_of(const CollapseParams& p, int64_t row) {
  const int64_t label = reinterpret_cast<const int64_t*>(p.labels)[row];
  return label >= 0 && label < p.classes ? label : -1;
}

__device__ double count_of(const CollapseParams& p, int64_t c) {
  return reinterpret_cast<const double*>(p.counts)[c];
}

template <class T>
__device__ T per_count(const CollapseParams& p, int64_t c) {
  const double count = count_of(p, c);
  return count > 0 ? static_cast<T>(1.0 / count) : T(0);
}

// The sum over the block's threads, in every thread, always in the same order. kSize threads.
template <int kSize>
__device__ double block_sum(double value) {
  __shared__ double warps[kSize / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kSize / 32; ++warp) sum += warps[warp];
  __syncthreads();
  return sum;
}

// One block per chunk. Counts the classes in `table` and ranks each row among its class's rows.
__global__ void rank_rows(Plan plan) {
  __shared__ int64_t labels[kThreads];
  const CollapseParams& p = plan.p;
  const int64_t first = blockIdx.x * plan.chunk_rows;
  const int64_t last = min(first + plan.chunk_rows, p.rows);
  int32_t* counts = plan.table + blockIdx.x * p.classes;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t row = start + threadIdx.x;
    const int here = static_cast<int>(min(last - start, static_cast<int64_t>(kThreads)));
    int64_t label = -1;
    if (row < last) {
      label = label_of(p, row);
      // Many threads may find one: a plain store would be a race, though all write the same.
      if (label < 0 && reinterpret_cast<const int64_t*>(p.labels)[row] != -1)
        atomicExch(plan.out_of_range, 1);
    }
    labels[threadIdx.x] = label;
    __syncthreads();
    int32_t before = 0, after = 0;
    if (label >= 0) {
      for (int i = 0; i < here; ++i) {
        const bool same = labels[i] == label;
        before += same && i < static_cast<int>(threadIdx.x);
        after += same && i > static_cast<int>(threadIdx.x);
      }
      before += counts[label];
      plan.ranks[row] = before;
    }
    __syncthreads();
    // The last of its class among these rows; nobody else writes this count.
    if (label >= 0 && after == 0) counts[label] = before + 1;
  }
}

// One thread per class: rows in all chunks, rows in the chunks before each, the new count.
__global__ void add_chunks(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.classes) return;
  int32_t total = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    int32_t& entry = plan.table[chunk * p.classes + c];
    const int32_t here = entry;
    entry = total;
    total += here;
  }
  plan.starts[c] = total;
  const double old = reinterpret_cast<const double*>(p.old_counts)[c];
  const double count = (plan.decay == 0 ? 0 : plan.decay * old) + total;
  reinterpret_cast<double*>(p.counts)[c] = plan.decay < 1 && count < kLeastCount ? 0 : count;
}

// One block: the numbers of rows in `starts` become places in `order`.
__global__ void __launch_bounds__(kFinishThreads) scan_classes(Plan plan) {
  __shared__ int64_t sums[kFinishThreads];
  const int64_t each = divide_up(plan.p.classes, kFinishThreads);
  const int64_t first = min(threadIdx.x * each, plan.p.classes);
  const int64_t last = min(first + each, plan.p.classes);
  int64_t own = 0;
  for (int64_t c = first; c < last; ++c) own += plan.starts[c];
  sums[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kFinishThreads; step *= 2) {
    const int64_t left = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += left;
    __syncthreads();
  }
  int64_t place = sums[threadIdx.x] - own;
  for (int64_t c = first; c < last; ++c) {
    const int64_t rows = plan.starts[c];
    plan.starts[c] = place;
    place += rows;
  }
  if (threadIdx.x == kFinishThreads - 1) plan.starts[plan.p.classes] = sums[threadIdx.x];
}

__global__ void place_rows(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t label = label_of(p, row);
  if (label < 0) return;
  const int64_t earlier = plan.table[row / plan.chunk_rows * p.classes + label];
  plan.order[plan.starts[label] + earlier + plan.ranks[row]] = row;
}

// A group of classes and kThreads columns: their new sums, and their part of the centre.
template <class T, class F>
__global__ void join_sums(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  const auto* features = reinterpret_cast<const F*>(p.features) + column;
  const int64_t first = blockIdx.x * plan.group_classes;
  const int64_t last = min(first + plan.group_classes, p.classes);
  T total = 0;
  for (int64_t c = first; c < last; ++c) {
    T sum = 0;
    int64_t i = plan.starts[c];
    const int64_t end = plan.starts[c + 1];
    constexpr int kTogether = 8;
    for (; i + kTogether <= end; i += kTogether) {
      T values[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        values[k] = widen(features[plan.order[i + k] * p.features_stride]);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) sum += values[k];
    }
    for (; i < end; ++i) sum += widen(features[plan.order[i] * p.features_stride]);
    const int64_t place = c * p.columns + column;
    const bool seen = count_of(p, c) > 0;
    // A sum that has been dropped or forgotten must not come back as 0 * infinity.
    if (plan.decay != 0 && seen) {
      sum += static_cast<T>(plan.decay) * reinterpret_cast<const T*>(p.old_sums)[place];
    }
    reinterpret_cast<T*>(p.sums)[place] = sum;
    if (seen) total += sum * per_count<T>(p, c);
  }
  static_cast<T*>(plan.partial)[blockIdx.x * p.columns + column] = total;
}

// out [columns] = the sum of the partial rows over the number of classes seen.
template <class T>
__global__ void __launch_bounds__(kAverageThreads) average(Plan plan, T* out) {
  __shared__ double sums[kAverageRows][kAverageColumns + 1];
  __shared__ int64_t seen[kAverageThreads];
  const CollapseParams& p = plan.p;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAverageColumns + threadIdx.x;
  const int thread = threadIdx.y * kAverageColumns + threadIdx.x;
  double sum = 0;
  if (column < p.columns) {
    for (int64_t group = threadIdx.y; group < plan.groups; group += kAverageRows) {
      sum += static_cast<double>(static_cast<const T*>(plan.partial)[group * p.columns + column]);
    }
  }
  int64_t own_seen = 0;
  for (int64_t c = thread; c < p.classes; c += kAverageThreads) {
    own_seen += count_of(p, c) > 0;
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  seen[thread] = own_seen;
  __syncthreads();
  for (int step = kAverageThreads / 2; step > 0; step /= 2) {
    if (thread < step) seen[thread] += seen[thread + step];
    __syncthreads();
  }
  if (threadIdx.y != 0 || column >= p.columns) return;
  double whole = 0;
  for (int row = 0; row < kAverageRows; ++row) whole += sums[row][threadIdx.x];
  out[column] = static_cast<T>(whole / static_cast<double>(max(seen[0], int64_t{1})));
}

template <class T>
__device__ T centred_mean(const CollapseParams& p, int64_t c, int64_t column, T by_count) {
  return reinterpret_cast<const T*>(p.sums)[c * p.columns + column] * by_count -
         reinterpret_cast<const T*>(p.centre)[column];
}

template <class W>
__device__ auto weight_at(const CollapseParams& p, int64_t c, int64_t column) {
  return widen(reinterpret_cast<const W*>(p.weight)[c * p.weight_stride + column]);
}

template <class T>
__device__ double rounding();
template <>
__device__ double rounding<float>() {
  return kCentredRounding * FLT_EPSILON;
}
template <>
__device__ double rounding<double>() {
  return kCentredRounding * DBL_EPSILON;
}

// One block per class: its cosine and squared lengths.
template <class T, class W>
__global__ void multiply(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t c = blockIdx.x;
  const bool seen = count_of(p, c) > 0;
  const T by_count = per_count<T>(p, c);
  T both = 0, weights = 0, means = 0, centres = 0;
  if (seen) {
    for (int64_t column = threadIdx.x; column < p.columns; column += kThreads) {
      const T w = weight_at<W>(p, c, column);
      const T m = centred_mean<T>(p, c, column, by_count);
      const T centre = reinterpret_cast<const T*>(p.centre)[column];
      both += w * m;
      weights += w * w;
      means += m * m;
      centres += centre * centre;
    }
  }
  const double dot = block_sum<kThreads>(static_cast<double>(both));
  const double weight = block_sum<kThreads>(static_cast<double>(weights));
  const double mean = block_sum<kThreads>(static_cast<double>(means));
  const double centre = block_sum<kThreads>(static_cast<double>(centres));
  if (threadIdx.x != 0) return;
  const double share = rounding<T>();
  // NaN has no direction either, but must show.
  const bool poisoned = isnan(weight + mean);
  const bool defined = seen && (poisoned || (weight > 0 && mean > share * share * centre));
  plan.products[c] = defined ? dot / (sqrt(weight) * sqrt(mean)) : 0;
  plan.products[p.classes + c] = defined ? weight : kNoCosine;
  plan.products[2 * p.classes + c] = mean;
}

// One block: the loss and the three factors of every class.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish(Plan plan) {
  const CollapseParams& p = plan.p;
  double own_seen = 0, own_sum = 0;
  for (int64_t c = threadIdx.x; c < p.classes; c += kFinishThreads) {
    if (!(count_of(p, c) > 0)) continue;
    own_seen += 1;
    own_sum += plan.products[c];
  }
  const double number = block_sum<kFinishThreads>(own_seen);
  const double mean = block_sum<kFinishThreads>(own_sum) / max(number, 1.0);
  double own_squares = 0;
  for (int64_t c = threadIdx.x; c < p.classes; c += kFinishThreads) {
    const double deviation = plan.products[c] - mean;
    if (count_of(p, c) > 0) own_squares += deviation * deviation;
  }
  const double squares = block_sum<kFinishThreads>(own_squares);
  const double spread = sqrt(squares / max(number - 1, 1.0));
  const double size = sqrt(mean * mean + kCvEpsilon * kCvEpsilon);
  const auto statistic = static_cast<CollapseStatistic>(p.statistic);
  const bool in_range = *plan.out_of_range == 0;
  if (threadIdx.x == 0) {
    const double value = statistic == CollapseStatistic::kMean ? 1 - mean
                         : statistic == CollapseStatistic::kCv ? spread / size
                                                               : spread;
    const double loss = number < 2 ? 0 : value;
    *reinterpret_cast<T*>(p.loss) = static_cast<T>(in_range ? loss : nan(""));
  }
  auto* factors = reinterpret_cast<T*>(p.factors);
  for (int64_t c = threadIdx.x; c < p.classes; c += kFinishThreads) {
    const double cosine = plan.products[c];
    const double weight = plan.products[p.classes + c];
    const double length = plan.products[2 * p.classes + c];
    double by_both = 0, by_weight = 0, by_mean = 0;
    if (in_range && number >= 2 && weight != kNoCosine) {
      double slope = -1 / number;
      if (statistic != CollapseStatistic::kMean) {
        slope = spread == 0 ? 0 : (cosine - mean) / ((number - 1) * spread);
      }
      if (statistic == CollapseStatistic::kCv) {
        slope = slope / size - spread * mean / (size * size * size * number);
      }
      by_both = slope / (sqrt(weight) * sqrt(length));
      by_weight = slope * cosine / weight;
      by_mean = slope * cosine / length;
    }
    factors[c] = static_cast<T>(by_both);
    factors[p.classes + c] = static_cast<T>(by_weight);
    factors[2 * p.classes + c] = static_cast<T>(by_mean);
  }
}

template <class T>
__device__ T factor(const CollapseParams& p, int which, int64_t c) {
  return *reinterpret_cast<const T*>(p.grad_loss) *
         reinterpret_cast<const T*>(p.factors)[which * p.classes + c];
}

// A group of classes and kThreads columns: the weight's gradient, and the group's part of the
// average gradient of centred means.
template <class T, class W>
__global__ void weight_gradients(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  const int64_t first = blockIdx.x * plan.group_classes;
  const int64_t last = min(first + plan.group_classes, p.classes);
  T total = 0;
  for (int64_t c = first; c < last; ++c) {
    T gradient = 0;
    if (count_of(p, c) > 0) {
      const T w = weight_at<W>(p, c, column);
      const T m = centred_mean<T>(p, c, column, per_count<T>(p, c));
      gradient = factor<T>(p, 0, c) * m - factor<T>(p, 1, c) * w;
      total += factor<T>(p, 0, c) * w - factor<T>(p, 2, c) * m;
    }
    if (p.grad_weight != 0) {
      narrow(gradient, reinterpret_cast<W*>(p.grad_weight)[c * p.columns + column]);
    }
  }
  if (p.grad_features != 0) {
    static_cast<T*>(plan.partial)[blockIdx.x * p.columns + column] = total;
  }
}

// A row and kThreads columns of the features' gradient.
template <class T, class W, class F>
__global__ void row_gradients(Plan plan) {
  const CollapseParams& p = plan.p;
  const int64_t row = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  const int64_t c = label_of(p, row);
  T gradient = 0;
  if (c >= 0) {
    const T by_count = per_count<T>(p, c);
    const T w = weight_at<W>(p, c, column);
    const T m = centred_mean<T>(p, c, column, by_count);
    const T average = static_cast<const T*>(plan.average)[column];
    gradient = (factor<T>(p, 0, c) * w - factor<T>(p, 2, c) * m - average) * by_count;
  }
  narrow(gradient, reinterpret_cast<F*>(p.grad_features)[row * p.columns + column]);
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(divide_up(items, per_block));
}

template <class T>
void launch_average(const Plan& plan, T* out, cudaStream_t stream) {
  const dim3 block(kAverageColumns, kAverageRows);
  average<T><<<blocks_for(plan.p.columns, kAverageColumns), block, 0, stream>>>(plan, out);
}

template <class T, class F, class W>
cudaError_t launch_forward(const Plan& plan, cudaStream_t stream) {
  const CollapseParams& p = plan.p;
  const cudaError_t cleared = cudaMemsetAsync(reinterpret_cast<void*>(p.workspace), 0,
                                              static_cast<size_t>(plan.cleared_bytes), stream);
  if (cleared != cudaSuccess) return cleared;
  const dim3 plane(static_cast<unsigned>(plan.groups), blocks_for(p.columns, kThreads));
  // An empty grid is a launch error in CUDA, and a batch may be empty.
  if (p.rows > 0) {
    rank_rows<<<static_cast<unsigned>(plan.chunks), kThreads, 0, stream>>>(plan);
  }
  add_chunks<<<blocks_for(p.classes, kThreads), kThreads, 0, stream>>>(plan);
  scan_classes<<<1, kFinishThreads, 0, stream>>>(plan);
  if (p.rows > 0) place_rows<<<blocks_for(p.rows, kThreads), kThreads, 0, stream>>>(plan);
  join_sums<T, F><<<plane, kThreads, 0, stream>>>(plan);
  launch_average(plan, reinterpret_cast<T*>(p.centre), stream);
  multiply<T, W><<<static_cast<unsigned>(p.classes), kThreads, 0, stream>>>(plan);
  finish<T><<<1, kFinishThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

template <class T, class F, class W>
cudaError_t launch_backward(const Plan& plan, cudaStream_t stream) {
  const CollapseParams& p = plan.p;
  const dim3 plane(static_cast<unsigned>(plan.groups), blocks_for(p.columns, kThreads));
  weight_gradients<T, W><<<plane, kThreads, 0, stream>>>(plan);
  if (p.grad_features != 0 && p.rows > 0) {
    launch_average(plan, static_cast<T*>(plan.average), stream);
    const dim3 grid(static_cast<unsigned>(p.rows), blocks_for(p.columns, kThreads));
    row_gradients<T, W, F><<<grid, kThreads, 0, stream>>>(plan);
  }
  return cudaGetLastError();
}

template <class F, class W>
cudaError_t launch(const Plan& plan, bool forward, cudaStream_t stream) {
  return forward ? launch_forward<float, F, W>(plan, stream)
                 : launch_backward<float, F, W>(plan, stream);
}

template <class F>
cudaError_t launch_for_weight(const Plan& plan, bool forward, cudaStream_t stream) {
  switch (static_cast<DType>(plan.p.weight_dtype)) {
    case DType::kFloat16:
      return launch<F, __half>(plan, forward, stream);
    case DType::kBFloat16:
      return launch<F, __nv_bfloat16>(plan, forward, stream);
    case DType::kFloat32:
      return launch<F, float>(plan, forward, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_for_dtypes(const Plan& plan, bool forward, cudaStream_t stream) {
  switch (static_cast<DType>(plan.p.features_dtype)) {
    case DType::kFloat16:
      return launch_for_weight<__half>(plan, forward, stream);
    case DType::kBFloat16:
      return launch_for_weight<__nv_bfloat16>(plan, forward, stream);
    case DType::kFloat32:
      return launch_for_weight<float>(plan, forward, stream);
    case DType::kFloat64:
      return forward ? launch_forward<double, double, double>(plan, stream)
                     : launch_backward<double, double, double>(plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t collapse_cuda_workspace_bytes(const CollapseParams& p) { return plan_of(p).bytes; }

cudaError_t collapse_alignment_cuda(const CollapseParams& p, cudaStream_t stream) {
  Plan plan = plan_of(p);
  plan.decay = *reinterpret_cast<const double*>(p.decay);
  return launch_for_dtypes(plan, true, stream);
}

cudaError_t collapse_alignment_backward_cuda(const CollapseParams& p, cudaStream_t stream) {
  return launch_for_dtypes(plan_of(p), false, stream);
}

}  // namespace fastdean
