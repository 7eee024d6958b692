// The contract between Python and the compiled operations.
//
// Plain integers and pointers only: no torch and no Python here. The caller owns all memory, tables
// included, and has checked every value, unless a function below says that it checks it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTDEAN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

// Before a function that both kernels and the CPU call.
#ifdef __CUDACC__
#define FASTDEAN_HOST_DEVICE __host__ __device__
#else
#define FASTDEAN_HOST_DEVICE
#endif

namespace fastdean {

// Rises by one with every change of a struct or signature in this file, or of the constants and
// functions that Python sees. fastdean/native/extension.py refuses any number but its own.
constexpr int kAbiVersion = 11;

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

// Python writes the structs below as arrays of int64, field after field. Each is declared as a list
// of (kind, name), from which both the struct and the names that Python compares with its own are
// made. Every field takes 8 bytes, or 8 for each dimension, so that no struct has padding.
namespace kind {
using Address = int64_t;
using Number = int64_t;  // a size, a count, or a stride in elements
using PerDimension = int64_t[kMaxRank];
using DType = int64_t;
using CpuLevel = int64_t;
using CollapseStatistic = int64_t;
}  // namespace kind

#define FASTDEAN_FIELD(type, name) kind::type name;
#define FASTDEAN_FIELD_NAME(type, name) #type " " #name,

// One tensor of a mask operation: one row of a table.
// clang-format off
#define FASTDEAN_PLACES_ROW(field) \
  field(Address, data)         /* of the element whose coordinates are all 0 */ \
  field(Address, indices)      /* int64 [count], row-major logical indices */ \
  field(Address, values)       /* [count]; gather_at fills it; write_at reads it */ \
  field(Number, count)         /* of indices */ \
  field(Number, numel)         /* of the tensor; indices lie in 0 .. numel - 1 */ \
  field(DType, dtype)          /* of the tensor and `values` */ \
  field(Number, rank)          /* 0: contiguous, an index is an offset; else 1 .. kMaxRank */ \
  field(PerDimension, sizes)   /* the first `rank` are the shape */ \
  field(PerDimension, strides) /* the first `rank` are the strides */
// clang-format on

struct PlacesRow {
  FASTDEAN_PLACES_ROW(FASTDEAN_FIELD)
};

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

// accumulate_importance: acc[e, r, c] += sum over the examples of e of |sum over their tokens t of
// g[t, r] x[t, c]| in fp32. e is an expert of a stacked weight; an ordinary one has one.
// clang-format off
#define FASTDEAN_IMPORTANCE_PARAMS(field) \
  field(Address, acc)          /* fp32 [experts, rows, columns] */ \
  field(Number, acc_stride_e) \
  field(Number, acc_stride_r) \
  field(Number, acc_stride_c) \
  field(Address, x)            /* [tokens, columns] */ \
  field(Number, x_stride_t) \
  field(Number, x_stride_c) \
  field(Address, g)            /* [tokens, rows] */ \
  field(Number, g_stride_t) \
  field(Number, g_stride_r) \
  field(DType, dtype)          /* of x and g; not kFloat64 */ \
  field(Number, experts)       /* at least 1 */ \
  field(Number, rows) \
  field(Number, columns) \
  field(Number, tokens) \
  field(Address, segments)     /* int64 [.., 2]: start and end row of each example, by expert */ \
  field(Address, expert_starts) /* int64 [experts + 1]: each expert's first example; the last is \
                                   the number of examples */ \
  field(CpuLevel, level)       /* one that this processor has */ \
  field(Number, num_workers)   /* threads that share the work, at least 1 */ \
  field(Address, workspace)    /* of accumulate_importance_workspace_bytes */
// clang-format on

struct ImportanceParams {
  FASTDEAN_IMPORTANCE_PARAMS(FASTDEAN_FIELD)
};

// select_top: the flat indices of the k entries of highest importance sums * |weight| / num_examples,
// every step in fp32; positive ones only, ties to the lowest index.
// clang-format off
#define FASTDEAN_SELECTION_PARAMS(field) \
  field(Address, sums)            /* fp32 [rows, columns] */ \
  field(Number, sums_stride_r) \
  field(Number, sums_stride_c) \
  field(Address, weight)          /* [rows, columns], or 0: importance is sums / num_examples */ \
  field(Number, weight_stride_r) \
  field(Number, weight_stride_c) \
  field(DType, weight_dtype) \
  field(Number, rows) \
  field(Number, columns) \
  field(Number, num_examples)     /* at least 1 */ \
  field(Number, k)                /* at most rows * columns */ \
  field(Address, indices)         /* int64 [k], written in ascending order */ \
  field(Address, found)           /* int64 [3], written: how many indices there are; the index of the \
                                     first importance that is infinite or NaN, or -1; its fp32 bits */ \
  field(CpuLevel, level)          /* one that this processor has */ \
  field(Number, num_workers)      /* threads that share the work, at least 1 */ \
  field(Address, workspace)       /* of select_top_workspace_bytes */
// clang-format on

struct SelectionParams {
  FASTDEAN_SELECTION_PARAMS(FASTDEAN_FIELD)
};

// select_importance: select_top of the sums that accumulate_importance makes of each set's examples,
// for one weight, or each expert of a stacked one, and any number of sets; the sums exist for a few
// rows at a time. A group is the examples of one set at one expert: expert after expert, and there
// set after set.
// clang-format off
#define FASTDEAN_IMPORTANCE_SELECTION_PARAMS(field) \
  field(Address, x)               /* [.., columns] */ \
  field(Number, x_stride_t) \
  field(Number, x_stride_c) \
  field(Address, x_rows)          /* int64 [tokens]: each token's row of x; or 0: its own number */ \
  field(Address, g)               /* [.., rows] */ \
  field(Number, g_stride_t) \
  field(Number, g_stride_r) \
  field(Address, g_rows)          /* as x_rows */ \
  field(DType, dtype)             /* of x and g; not kFloat64 */ \
  field(Address, weight)          /* [experts, rows, columns], of column stride 1 */ \
  field(Number, weight_stride_e) \
  field(Number, weight_stride_r) \
  field(DType, weight_dtype) \
  field(Number, experts)          /* at least 1 */ \
  field(Number, rows) \
  field(Number, columns) \
  field(Number, tokens) \
  field(Address, segments)        /* int64 [examples, 2]: first token and end, group after group */ \
  field(Address, group_starts)    /* int64 [experts * num_sets + 1]: the first example of each, and \
                                     the end */ \
  field(Address, batches)         /* int64 [examples] or 0: examples of two numbers share no chunk */ \
  field(Address, ks)              /* int64 [num_sets]: each at most rows * columns */ \
  field(Address, num_examples)    /* int64 [num_sets]: at least 1 */ \
  field(Number, num_sets) \
  field(Address, indices)         /* int64, written: ascending, room for its set's k for each group */ \
  field(Address, sums)            /* fp32, written: the sums there */ \
  field(Address, signed_sums)     /* fp32, written: sum_t g[t, r] x[t, c] there; or 0 */ \
  field(Address, found)           /* int64 [experts, num_sets, 3], written: as that of select_top */ \
  field(CpuLevel, level)          /* one that this processor has */ \
  field(Number, num_workers)      /* threads that share the work, at least 1 */ \
  field(Address, workspace)       /* of select_importance_workspace_bytes */
// clang-format on

struct ImportanceSelectionParams {
  FASTDEAN_IMPORTANCE_SELECTION_PARAMS(FASTDEAN_FIELD)
};

// bit_sums: of a matrix's bits as signed integers the sums of each row and of each column, modulo 2^64.
// clang-format off
#define FASTDEAN_BIT_SUMS_PARAMS(field) \
  field(Address, bits)         /* [rows, columns] */ \
  field(Number, stride_r) \
  field(Number, stride_c) \
  field(Number, bytes)         /* of an entry: 1, 2, 4 or 8 */ \
  field(Number, rows) \
  field(Number, columns) \
  field(Address, of_rows)      /* int64 [rows], zeros; filled */ \
  field(Address, of_columns)   /* int64 [num_workers, columns], zeros; each worker fills its own */ \
  field(Number, num_workers)   /* threads that share the work, at least 1 */
// clang-format on

struct BitSumsParams {
  FASTDEAN_BIT_SUMS_PARAMS(FASTDEAN_FIELD)
};

enum class CollapseStatistic : int64_t {
  kStd = 0,
  kCv = 1,
  kMean = 2,
};

// The loss at its edges; fastdean/ops/reference.py has the same numbers.
constexpr double kCvEpsilon = 1e-3;
constexpr double kLeastCount = 1.0 / 1048576.0;
constexpr double kCentredRounding = 8.0;

// The collapse-alignment loss and its backward; fastdean/ops/collapse.py has the formulas. What has
// no stride is contiguous; a row's elements always are. T is fp32 or fp64, the type of the sums.
// "forward" and "backward": read or written by that one alone.
// clang-format off
#define FASTDEAN_COLLAPSE_PARAMS(field) \
  field(Address, features)            /* [rows, columns]; forward */ \
  field(Number, features_stride)      /* between rows */ \
  field(DType, features_dtype)        /* also of grad_features */ \
  field(Address, labels)              /* int64 [rows]: 0 .. classes - 1, or -1 */ \
  field(Address, weight)              /* [classes, columns] */ \
  field(Number, weight_stride)        /* between rows */ \
  field(DType, weight_dtype)          /* also of grad_weight */ \
  field(Address, old_sums)            /* T [classes, columns]; forward; on the CPU maybe `sums` */ \
  field(Address, old_counts)          /* fp64 [classes]; forward; `counts` if old_sums is `sums` */ \
  field(Address, decay)               /* one fp64 in host memory; forward */ \
  field(CollapseStatistic, statistic) /* forward */ \
  field(Address, sums)                /* T [classes, columns]; the forward writes it */ \
  field(Address, counts)              /* fp64 [classes]; the forward writes it */ \
  field(Address, centre)              /* T [columns]; the forward writes it */ \
  field(Address, factors)             /* T [3, classes]; the forward writes it */ \
  field(Address, loss)                /* T; forward */ \
  field(DType, sums_dtype)            /* kFloat32, or kFloat64 if features and weight are */ \
  field(Address, grad_loss)           /* T; backward */ \
  field(Address, grad_weight)         /* [classes, columns], or 0; backward */ \
  field(Address, grad_features)       /* [rows, columns], or 0; backward */ \
  field(Number, rows) \
  field(Number, columns) \
  field(Number, classes) \
  field(CpuLevel, level)              /* one that this processor has; CPU */ \
  field(Number, num_workers)          /* threads that share the work, at least 1; CPU */ \
  field(Address, workspace)           /* of collapse_workspace_bytes or its CUDA form */
// clang-format on

struct CollapseParams {
  FASTDEAN_COLLAPSE_PARAMS(FASTDEAN_FIELD)
};

// 0 for a value that is no DType. The mask operations need no more than this width: they copy and
// compare bits, and zero is all bits clear in every DType.
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
// Where rows share memory and disagree about a value, either may remain.
Status gather_at_cpu(const PlacesParams& params);
Status write_at_cpu(const PlacesParams& params);
Status zero_at_cpu(const PlacesParams& params);

// The highest level that this processor has and this build contains.
CpuLevel best_cpu_level();

// Reads everything but the addresses of acc, x, g and workspace.
int64_t accumulate_importance_workspace_bytes(const ImportanceParams& params);

// Checks level, dtype and segments, then adds to acc; leaves it alone unless kOk.
Status accumulate_importance_cpu(const ImportanceParams& params);

// Reads sizes and k.
int64_t select_top_workspace_bytes(const SelectionParams& params);

// Checks level and dtype; writes nothing unless kOk.
Status select_top_cpu(const SelectionParams& params);

// Reads sizes, segments, groups, batches and ks.
int64_t select_importance_workspace_bytes(const ImportanceSelectionParams& params);

// Checks level, dtypes and segments; writes nothing unless kOk.
Status select_importance_cpu(const ImportanceSelectionParams& params);

// Checks `bytes`; writes nothing unless kOk.
Status bit_sums_cpu(const BitSumsParams& params);

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
