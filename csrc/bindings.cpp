// Integers from Python -> struct -> launch -> exception. The only file that knows Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "fastdean.h"

#ifndef FASTDEAN_WITH_CUDA
#define FASTDEAN_CUDA_VERSION ""
#define FASTDEAN_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

void raise_unless_ok(fastdean::Status status) {
  switch (status) {
    case fastdean::Status::kOk:
      return;
    case fastdean::Status::kUnknownDType:
      throw std::invalid_argument("dtype must be one of the dtypes of fastdean.h");
    case fastdean::Status::kRankTooLarge:
      throw std::invalid_argument("rank must be from 0 to " + std::to_string(fastdean::kMaxRank));
    case fastdean::Status::kIndexOutOfRange:
      throw std::out_of_range("indices must lie within the tensor; nothing was written");
    case fastdean::Status::kUnsupportedLevel:
      throw std::invalid_argument("level must be an instruction set that this processor has");
  }
}

#ifdef FASTDEAN_WITH_CUDA
void raise_unless_ok(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " on CUDA: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}
#endif

fastdean::ZeroAtParams zero_at_params(int64_t rows, int64_t num_rows, int64_t max_count) {
  return {reinterpret_cast<const fastdean::ZeroAtRow*>(rows), num_rows, max_count};
}

void zero_at_cpu(int64_t rows, int64_t num_rows, int64_t max_count) {
  raise_unless_ok(fastdean::zero_at_cpu(zero_at_params(rows, num_rows, max_count)));
}

#ifdef FASTDEAN_WITH_CUDA
void zero_at_cuda(int64_t rows, int64_t num_rows, int64_t max_count, int64_t stream) {
  raise_unless_ok(fastdean::zero_at_cuda(zero_at_params(rows, num_rows, max_count),
                                         reinterpret_cast<cudaStream_t>(stream)),
                  "zero_at");
}
#endif

// `params` is the address of an ImportanceParams that Python wrote field by field.
const fastdean::ImportanceParams& importance_params(int64_t params) {
  return *reinterpret_cast<const fastdean::ImportanceParams*>(params);
}

int64_t importance_workspace_bytes(int64_t params) {
  return fastdean::accumulate_importance_workspace_bytes(importance_params(params));
}

void accumulate_importance_cpu(int64_t params) {
  raise_unless_ok(fastdean::accumulate_importance_cpu(importance_params(params)));
}

// `params` is the address of a CollapseParams that Python wrote field by field.
const fastdean::CollapseParams& collapse_params(int64_t params) {
  return *reinterpret_cast<const fastdean::CollapseParams*>(params);
}

int64_t collapse_workspace_bytes(int64_t params) {
  return fastdean::collapse_workspace_bytes(collapse_params(params));
}

void collapse_alignment_cpu(int64_t params) {
  raise_unless_ok(fastdean::collapse_alignment_cpu(collapse_params(params)));
}

void collapse_alignment_backward_cpu(int64_t params) {
  raise_unless_ok(fastdean::collapse_alignment_backward_cpu(collapse_params(params)));
}

#ifdef FASTDEAN_WITH_CUDA
int64_t collapse_cuda_workspace_bytes(int64_t params) {
  return fastdean::collapse_cuda_workspace_bytes(collapse_params(params));
}

void collapse_alignment_cuda(int64_t params, int64_t stream) {
  raise_unless_ok(fastdean::collapse_alignment_cuda(collapse_params(params),
                                                    reinterpret_cast<cudaStream_t>(stream)),
                  "collapse_alignment");
}

void collapse_alignment_backward_cuda(int64_t params, int64_t stream) {
  raise_unless_ok(fastdean::collapse_alignment_backward_cuda(
                      collapse_params(params), reinterpret_cast<cudaStream_t>(stream)),
                  "collapse_alignment_backward");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of fastdean; fastdean/native.py is the only caller.";

  m.attr("ABI_VERSION") = fastdean::kAbiVersion;
  m.attr("COMPILER") = FASTDEAN_COMPILER;
  m.attr("CUDA_VERSION") = FASTDEAN_CUDA_VERSION;
  m.attr("CUDA_ARCHITECTURES") = FASTDEAN_CUDA_ARCHITECTURES;
  m.attr("MAX_RANK") = fastdean::kMaxRank;
  m.attr("ROW_FIELDS") = fastdean::kRowFields;
  m.attr("IMPORTANCE_FIELDS") = fastdean::kImportanceFields;
  m.attr("COLLAPSE_FIELDS") = fastdean::kCollapseFields;
  m.attr("DTYPE_FLOAT16") = static_cast<int64_t>(fastdean::DType::kFloat16);
  m.attr("DTYPE_BFLOAT16") = static_cast<int64_t>(fastdean::DType::kBFloat16);
  m.attr("DTYPE_FLOAT32") = static_cast<int64_t>(fastdean::DType::kFloat32);
  m.attr("DTYPE_FLOAT64") = static_cast<int64_t>(fastdean::DType::kFloat64);

  m.attr("CPU_LEVEL") = static_cast<int64_t>(fastdean::best_cpu_level());

  m.def("accumulate_importance_workspace_bytes", &importance_workspace_bytes, py::kw_only(),
        py::arg("params"));
  m.def("accumulate_importance_cpu", &accumulate_importance_cpu, py::kw_only(), py::arg("params"),
        py::call_guard<py::gil_scoped_release>());
  m.def("collapse_workspace_bytes", &collapse_workspace_bytes, py::kw_only(), py::arg("params"));
  m.def("collapse_alignment_cpu", &collapse_alignment_cpu, py::kw_only(), py::arg("params"),
        py::call_guard<py::gil_scoped_release>());
  m.def("collapse_alignment_backward_cpu", &collapse_alignment_backward_cpu, py::kw_only(),
        py::arg("params"), py::call_guard<py::gil_scoped_release>());
  m.def("zero_at_cpu", &zero_at_cpu, py::kw_only(), py::arg("rows"), py::arg("num_rows"),
        py::arg("max_count"), py::call_guard<py::gil_scoped_release>());
#ifdef FASTDEAN_WITH_CUDA
  m.def("collapse_cuda_workspace_bytes", &collapse_cuda_workspace_bytes, py::kw_only(),
        py::arg("params"));
  m.def("collapse_alignment_cuda", &collapse_alignment_cuda, py::kw_only(), py::arg("params"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("collapse_alignment_backward_cuda", &collapse_alignment_backward_cuda, py::kw_only(),
        py::arg("params"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("zero_at_cuda", &zero_at_cuda, py::kw_only(), py::arg("rows"), py::arg("num_rows"),
        py::arg("max_count"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}
