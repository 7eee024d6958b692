// The contract between Python and the compiled operations.
//
// Plain integers and pointers only: no torch and no Python here. The caller owns all memory, the
// tables included, and has checked every value that a function below does not say it checks.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTDEAN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

// For what both a kernel and the CPU call.
#ifdef __CUDACC__
#define FASTDEAN_HOST_DEVICE __host__ __device__
#else
#define FASTDEAN_HOST_DEVICE
#endif

namespace fastdean {

// Raised by one with every change of a struct or a signature in this file, or of the constants and
// functions that Python sees; fastdean/native/extension.py names the number it was written for,
// refusing another.
constexpr int kAbiVersion = 7;

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
  kUnsupportedLevel,
};

// Instruction sets of the CPU operations, each including those before it.
enum class CpuLevel : int64_t {
  kPortable = 0,
  kAvx2 = 1,    // with FMA
  kAvx512 = 2,  // AVX512F
  kAvx512Bf16 = 3,
  kAmxBf16 = 4,  // AMX-TILE and AMX-BF16, if the system grants them
};

// The highest of `levels`, which ascend from kPortable, that is not above `limit`.
template <std::size_t count>
constexpr CpuLevel highest_level(const CpuLevel (&levels)[count], CpuLevel limit) {
  CpuLevel found = CpuLevel::kPortable;
  for (const CpuLevel level : levels) {
    if (level <= limit) found = level;
  }
  return found;
}

// One tensor of a mask operation: one row of the table that Python writes as int64 [T, kRowFields].
// Every field has eight bytes so that the row has no padding.
struct PlacesRow {
  int64_t data;               // address of the element whose coordinates are all 0
  int64_t indices;            // address of int64 [count], row-major logical indices
  int64_t values;             // address of [count] elements: gather_at fills them, write_at writes
                              // them; zero_at has none
  int64_t expected;           // no operation reads it
  int64_t count;              // how many indices
  int64_t numel;              // how many elements the tensor has; indices lie in 0 .. numel - 1
  int64_t dtype;              // a DType, of the tensor, `values` and `expected`
  int64_t rank;               // 0: contiguous, an index is an offset; else 1 .. kMaxRank
  int64_t sizes[kMaxRank];    // the first `rank` are the shape
  int64_t strides[kMaxRank];  // the first `rank` are the strides, in elements
};

constexpr int kRowFields = 8 + 2 * kMaxRank;
static_assert(sizeof(PlacesRow) == kRowFields * sizeof(int64_t), "a row must have no padding");

// The mask operations, all by bits. With t the tensor of a row and p = unravel(index):
//   gather_at   values[i] = t[p[i]]
//   write_at    t[p[i]] = values[i]
//   zero_at     t[p[i]] = 0
struct PlacesParams {
  const PlacesRow* rows;  // [num_rows]; in host memory for the CPU, in device memory for CUDA
  int64_t num_rows;       // how many tensors
  int64_t max_count;      // the largest `count` of the rows; sizes the CUDA grid
  int64_t num_workers;    // how many threads may share the work on the CPU, at least 1
};

// accumulate_importance: acc[r, c] += sum over examples of |sum over its tokens t of g[t, r] x[t, c]|
// in fp32. Python writes it as int64 [kImportanceFields]. All strides in elements.
struct ImportanceParams {
  int64_t acc;  // address of fp32 [rows, columns]
  int64_t acc_stride_r;
  int64_t acc_stride_c;
  int64_t x;  // address of [tokens, columns]
  int64_t x_stride_t;
  int64_t x_stride_c;
  int64_t g;  // address of [tokens, rows]
  int64_t g_stride_t;
  int64_t g_stride_r;
  int64_t dtype;  // a DType but kFloat64, of x and g
  int64_t rows;
  int64_t columns;
  int64_t tokens;
  int64_t segments;  // address of int64 [num_segments, 2]: start and end row of each example
  int64_t num_segments;
  int64_t level;        // a CpuLevel that this processor has
  int64_t num_workers;  // how many threads share the work, at least 1
  int64_t workspace;    // address of as many bytes as accumulate_importance_workspace_bytes says
};

constexpr int kImportanceFields = 18;
static_assert(sizeof(ImportanceParams) == kImportanceFields * sizeof(int64_t),
              "the fields must be those that Python writes");

enum class CollapseStatistic : int64_t {
  kStd = 0,
  kCv = 1,
  kMean = 2,
};

// What the loss means at its edges; fastdean/ops/reference.py has the same numbers.
constexpr double kCvEpsilon = 1e-3;
constexpr double kLeastCount = 1.0 / 1048576.0;
constexpr double kCentredRounding = 8.0;

// The collapse-alignment loss and its backward; fastdean/ops/collapse.py says what they compute.
// Python writes it as int64 [kCollapseFields]. What has no stride is contiguous; a row's elements
// always are. T is fp32 or fp64, the type of the sums.
struct CollapseParams {
  int64_t features;         // address of [rows, columns]; forward
  int64_t features_stride;  // between rows, in elements
  int64_t features_dtype;   // a DType; also that of grad_features
  int64_t labels;           // address of int64 [rows]: 0 .. classes - 1, or -1
  int64_t weight;           // address of [classes, columns]
  int64_t weight_stride;    // between rows, in elements
  int64_t weight_dtype;     // a DType; also that of grad_weight
  int64_t old_sums;         // address of T [classes, columns]; forward; on the CPU it may be `sums`
  int64_t old_counts;       // address of fp64 [classes]; forward; `counts` where old_sums is `sums`
  int64_t decay;            // address of one fp64 in host memory; forward
  int64_t statistic;        // a CollapseStatistic; forward
  int64_t sums;             // address of T [classes, columns]; written by the forward
  int64_t counts;           // address of fp64 [classes]; written by the forward
  int64_t centre;           // address of T [columns]; written by the forward
  int64_t factors;          // address of T [3, classes]; written by the forward
  int64_t loss;             // address of T; written by the forward
  int64_t sums_dtype;       // kFloat32, or kFloat64 if features and weight are
  int64_t grad_loss;        // address of T; backward
  int64_t grad_weight;      // address of [classes, columns], or 0; backward
  int64_t grad_features;    // address of [rows, columns], or 0; backward
  int64_t rows;
  int64_t columns;
  int64_t classes;
  int64_t level;        // a CpuLevel that this processor has; CPU
  int64_t num_workers;  // how many threads share the work, at least 1; CPU
  int64_t workspace;    // address of as many bytes as the function of this name says
};

constexpr int kCollapseFields = 26;
static_assert(sizeof(CollapseParams) == kCollapseFields * sizeof(int64_t),
              "the fields must be those that Python writes");

// Values are copied and compared by their bits, and zero is all bits clear in every DType: the mask
// operations need the width of an element and no more. Returns 0 for a value that is no DType.
FASTDEAN_HOST_DEVICE inline int element_bytes(int64_t dtype) {
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
FASTDEAN_HOST_DEVICE inline int64_t element_offset(const PlacesRow& row, int64_t index) {
  if (row.rank == 0) return index;
  int64_t offset = 0;
  for (int64_t dim = row.rank - 1; dim >= 0; --dim) {
    offset += (index % row.sizes[dim]) * row.strides[dim];
    index /= row.sizes[dim];
  }
  return offset;
}

// These check dtype, rank and index range of every row, then write; they write nothing unless kOk.
// Where rows share memory and disagree about a value there, which of them stays is left open.
Status gather_at_cpu(const PlacesParams& params);
Status write_at_cpu(const PlacesParams& params);
Status zero_at_cpu(const PlacesParams& params);

// The highest level that this processor has and this build contains.
CpuLevel best_cpu_level();

// Reads everything but the addresses of acc, x, g and workspace.
int64_t accumulate_importance_workspace_bytes(const ImportanceParams& params);

// Checks level, dtype and segments, then adds to acc; leaves it alone unless kOk.
Status accumulate_importance_cpu(const ImportanceParams& params);

// For forward and backward; reads everything but the addresses.
int64_t collapse_workspace_bytes(const CollapseParams& params);

// Both check level, dtypes and labels, and write nothing unless kOk.
Status collapse_alignment_cpu(const CollapseParams& params);
Status collapse_alignment_backward_cpu(const CollapseParams& params);

#ifdef FASTDEAN_WITH_CUDA
// Each enqueues one kernel on `stream` of the current device. They check nothing: the rows are not
// readable from the host.
cudaError_t gather_at_cuda(const PlacesParams& params, cudaStream_t stream);
cudaError_t write_at_cuda(const PlacesParams& params, cudaStream_t stream);
cudaError_t zero_at_cuda(const PlacesParams& params, cudaStream_t stream);

// For forward and backward; reads everything but the addresses.
int64_t collapse_cuda_workspace_bytes(const CollapseParams& params);

// Both enqueue kernels on `stream` of the current device. Labels out of range count as -1 and make
// the loss NaN.
cudaError_t collapse_alignment_cuda(const CollapseParams& params, cudaStream_t stream);
cudaError_t collapse_alignment_backward_cuda(const CollapseParams& params, cudaStream_t stream);
#endif

}  // namespace fastdean
