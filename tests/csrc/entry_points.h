// The operations that the checks call: the CPU's, or with FASTDEAN_WITH_CUDA those of the kernels,
// which run on the CPU then (cuda_on_cpu/).
//
// The kernels know neither levels nor workers: calls that differ in these differ in the order in
// which threads run. They check nothing but dtypes, and a launch that a device would refuse is no
// status of ours.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "fastdean.h"

namespace entry_points {

using fastdean::CollapseParams;
using fastdean::CpuLevel;
using fastdean::PlacesParams;
using fastdean::Status;

#ifdef FASTDEAN_WITH_CUDA

constexpr bool kOnCuda = true;

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return Status::kOk;
  if (error == cudaErrorInvalidValue) return Status::kUnknownDType;
  std::printf("a launch with an impossible configuration\n");
  std::exit(1);
}

inline CpuLevel best_level() { return CpuLevel::kPortable; }

inline Status gather_at(const PlacesParams& p) {
  return status_of(fastdean::gather_at_cuda(p, nullptr));
}
inline Status write_at(const PlacesParams& p) {
  return status_of(fastdean::write_at_cuda(p, nullptr));
}
inline Status zero_at(const PlacesParams& p) {
  return status_of(fastdean::zero_at_cuda(p, nullptr));
}

inline int64_t collapse_workspace_bytes(const CollapseParams& p) {
  return fastdean::collapse_cuda_workspace_bytes(p);
}
inline Status collapse_alignment(const CollapseParams& p) {
  return status_of(fastdean::collapse_alignment_cuda(p, nullptr));
}
inline Status collapse_alignment_backward(const CollapseParams& p) {
  return status_of(fastdean::collapse_alignment_backward_cuda(p, nullptr));
}

#else

constexpr bool kOnCuda = false;

inline CpuLevel best_level() { return fastdean::best_cpu_level(); }

inline Status gather_at(const PlacesParams& p) { return fastdean::gather_at_cpu(p); }
inline Status write_at(const PlacesParams& p) { return fastdean::write_at_cpu(p); }
inline Status zero_at(const PlacesParams& p) { return fastdean::zero_at_cpu(p); }

inline int64_t collapse_workspace_bytes(const CollapseParams& p) {
  return fastdean::collapse_workspace_bytes(p);
}
inline Status collapse_alignment(const CollapseParams& p) {
  return fastdean::collapse_alignment_cpu(p);
}
inline Status collapse_alignment_backward(const CollapseParams& p) {
  return fastdean::collapse_alignment_backward_cpu(p);
}

#endif

}  // namespace entry_points
