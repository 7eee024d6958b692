// Integers from Python -> struct -> launch -> exception. The only file that knows Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "collapse_levels.h"
#include "fastdean.h"
#include "importance_levels.h"
#include "selection_levels.h"

#ifndef FASTDEAN_WITH_CUDA
#define FASTDEAN_CUDA_VERSION ""
#define FASTDEAN_CUDA_ARCHITECTURES ""
#define FASTDEAN_CUDA_SOURCES ""
#endif

namespace py = pybind11;

namespace {

// The messages of one operation, in words of its arguments. Made without the GIL.
struct Refusals {
  std::string dtype;
  std::string range;
  int64_t level;
};

[[noreturn]] void refuse(fastdean::Status status, const Refusals& refusals) {
  switch (status) {
    case fastdean::Status::kUnknownDType:
      throw py::type_error(refusals.dtype);
    case fastdean::Status::kRankTooLarge:
      throw std::invalid_argument("tensors must have at most " +
                                  std::to_string(fastdean::kMaxRank) +
                                  " dimensions, got more; view them with fewer");
    case fastdean::Status::kIndexOutOfRange:
      throw std::out_of_range(refusals.range);
    case fastdean::Status::kUnsupportedLevel: {
      const auto highest = static_cast<int64_t>(fastdean::best_cpu_level());
      throw std::invalid_argument(
          "level must be an instruction set that this processor has, 0 to " +
          std::to_string(highest) + ", got " + std::to_string(refusals.level) +
          "; leave it out to take the highest");
    }
    case fastdean::Status::kOk:
      break;
  }
  throw std::logic_error("a status that is refused must be an error");
}

std::string dtype_name(int64_t dtype) {
  switch (static_cast<fastdean::DType>(dtype)) {
    case fastdean::DType::kFloat16:
      return "float16";
    case fastdean::DType::kBFloat16:
      return "bfloat16";
    case fastdean::DType::kFloat32:
      return "float32";
    case fastdean::DType::kFloat64:
      return "float64";
  }
  return "number " + std::to_string(dtype);
}

void raise_unless_ok(fastdean::Status status, const fastdean::PlacesParams&) {
  if (status == fastdean::Status::kOk) return;
  refuse(status, {"tensors must be float16, bfloat16, float32 or float64, got another dtype; "
                  "convert them",
                  "indices must lie within their tensors, got one outside; nothing was written, "
                  "make them for these tensors",
                  0});
}

void raise_unless_ok(fastdean::Status status, const fastdean::ImportanceParams& p) {
  if (status == fastdean::Status::kOk) return;
  refuse(status, {"x and g must be float32, bfloat16 or float16, got " + dtype_name(p.dtype) +
                      "; cast them, or use impl='reference'",
                  "segments must satisfy 0 <= start <= end <= " + std::to_string(p.tokens) +
                      ", got others; check the batch's layout",
                  p.level});
}

void raise_unless_ok(fastdean::Status status, const fastdean::SelectionParams& p) {
  if (status == fastdean::Status::kOk) return;
  refuse(status, {"weight must be float32, bfloat16, float16 or float64, got " +
                      dtype_name(p.weight_dtype) + "; cast it, or use impl='reference'",
                  "", p.level});
}

void raise_unless_ok(fastdean::Status status, const fastdean::ImportanceSelectionParams& p) {
  if (status == fastdean::Status::kOk) return;
  refuse(status,
         {"x and g must be float32, bfloat16 or float16, and weight one of these or float64, "
          "got " +
              dtype_name(p.dtype) + " and " + dtype_name(p.weight_dtype) +
              "; cast them, or use impl='reference'",
          "segments must satisfy 0 <= start <= end <= " + std::to_string(p.tokens) +
              ", got others; check the batch's layout",
          p.level});
}

void raise_unless_ok(fastdean::Status status, const fastdean::BitSumsParams& p) {
  if (status == fastdean::Status::kOk) return;
  refuse(status, {"entries must have 1, 2, 4 or 8 bytes, got " + std::to_string(p.bytes) +
                      "; view them as integers",
                  "", 0});
}

void raise_unless_ok(fastdean::Status status, const fastdean::CollapseParams& p) {
  if (status == fastdean::Status::kOk) return;
  refuse(status, {"features, weight and sums must be float32, bfloat16 or float16 with sums in "
                  "float32, or all float64, got " +
                      dtype_name(p.features_dtype) + ", " + dtype_name(p.weight_dtype) + " and " +
                      dtype_name(p.sums_dtype) + "; cast them",
                  "labels must lie in 0.." + std::to_string(p.classes - 1) +
                      ", or be -1, got others; check which rows are labelled",
                  p.level});
}

#ifdef FASTDEAN_WITH_CUDA
void raise_unless_ok(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " on CUDA: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}
#endif

using PlacesOnCpu = fastdean::Status (*)(const fastdean::PlacesParams&);

fastdean::PlacesParams places_params(int64_t rows, int64_t num_rows, int64_t num_workers) {
  return {reinterpret_cast<const fastdean::PlacesRow*>(rows), num_rows, 0, num_workers};
}

template <PlacesOnCpu op>
void places_cpu(int64_t rows, int64_t num_rows, int64_t num_workers) {
  const fastdean::PlacesParams params = places_params(rows, num_rows, num_workers);
  raise_unless_ok(op(params), params);
}

template <PlacesOnCpu op>
void def_places_cpu(py::module_& m, const char* name) {
  m.def(name, &places_cpu<op>, py::kw_only(), py::arg("rows"), py::arg("num_rows"),
        py::arg("num_workers"), py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTDEAN_WITH_CUDA
using PlacesOnCuda = cudaError_t (*)(const fastdean::PlacesParams&, cudaStream_t);

template <PlacesOnCuda op>
void def_places_cuda(py::module_& m, const char* name) {
  m.def((std::string(name) + "_cuda").c_str(),
        [name](int64_t rows, int64_t num_rows, int64_t max_count, int64_t stream) {
          raise_unless_ok(
              op({reinterpret_cast<const fastdean::PlacesRow*>(rows), num_rows, max_count, 1},
                 reinterpret_cast<cudaStream_t>(stream)),
              name);
        },
        py::kw_only(), py::arg("rows"), py::arg("num_rows"), py::arg("max_count"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

// The struct that Python wrote at this address.
template <class Params>
const Params& written_at(int64_t address) {
  return *reinterpret_cast<const Params*>(address);
}

template <class Params>
using OnCpu = fastdean::Status (*)(const Params&);
template <class Params>
using WorkspaceBytes = int64_t (*)(const Params&);

template <class Params, OnCpu<Params> op>
void def_params_cpu(py::module_& m, const char* name) {
  m.def(
      name,
      [](int64_t params) {
        const Params& p = written_at<Params>(params);
        raise_unless_ok(op(p), p);
      },
      py::kw_only(), py::arg("params"), py::call_guard<py::gil_scoped_release>());
}

template <class Params, WorkspaceBytes<Params> size>
void def_workspace_bytes(py::module_& m, const char* name) {
  m.def(
      name, [](int64_t params) { return size(written_at<Params>(params)); }, py::kw_only(),
      py::arg("params"));
}

#ifdef FASTDEAN_WITH_CUDA
using CollapseOnCuda = cudaError_t (*)(const fastdean::CollapseParams&, cudaStream_t);

template <CollapseOnCuda op>
void def_collapse_cuda(py::module_& m, const char* name) {
  m.def((std::string(name) + "_cuda").c_str(),
        [name](int64_t params, int64_t stream) {
          raise_unless_ok(op(written_at<fastdean::CollapseParams>(params),
                             reinterpret_cast<cudaStream_t>(stream)),
                          name);
        },
        py::kw_only(), py::arg("params"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}
#endif

// Each field as "kind name".
py::tuple fields(std::initializer_list<const char*> names) {
  py::tuple result(names.size());
  std::size_t i = 0;
  for (const char* name : names) result[i++] = name;
  return result;
}

const char* name_of(fastdean::CpuLevel level) {
  switch (level) {
    case fastdean::CpuLevel::kPortable:
      return "portable";
    case fastdean::CpuLevel::kAvx2:
      return "AVX2";
    case fastdean::CpuLevel::kAvx512:
      return "AVX512";
    case fastdean::CpuLevel::kAvx512Bf16:
      return "AVX512-BF16";
    case fastdean::CpuLevel::kAmxBf16:
      return "AMX-BF16";
  }
  throw std::logic_error("every level must have a name");
}

// NAME_LEVELS: the levels an operation was compiled for; NAME_LEVEL: the one that runs here.
template <std::size_t count>
void add_levels(py::module_& m, const std::string& name,
                const fastdean::CpuLevel (&levels)[count]) {
  py::tuple names(count);
  for (std::size_t i = 0; i < count; ++i) names[i] = name_of(levels[i]);
  m.attr((name + "_LEVELS").c_str()) = names;
  m.attr((name + "_LEVEL").c_str()) =
      name_of(fastdean::highest_level(levels, fastdean::best_cpu_level()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of fastdean; fastdean/native/ is the only caller.";

  m.attr("ABI_VERSION") = fastdean::kAbiVersion;
  m.attr("COMPILER") = FASTDEAN_COMPILER;
  m.attr("CUDA_VERSION") = FASTDEAN_CUDA_VERSION;
  m.attr("CUDA_ARCHITECTURES") = FASTDEAN_CUDA_ARCHITECTURES;
  // "file=SHA-256 " for each source of a CUDA operation.
  m.attr("CUDA_SOURCES") = FASTDEAN_CUDA_SOURCES;
  m.attr("MAX_RANK") = fastdean::kMaxRank;
  py::dict structs;
  structs["PlacesRow"] = fields({FASTDEAN_PLACES_ROW(FASTDEAN_FIELD_NAME)});
  structs["ImportanceParams"] = fields({FASTDEAN_IMPORTANCE_PARAMS(FASTDEAN_FIELD_NAME)});
  structs["SelectionParams"] = fields({FASTDEAN_SELECTION_PARAMS(FASTDEAN_FIELD_NAME)});
  structs["ImportanceSelectionParams"] =
      fields({FASTDEAN_IMPORTANCE_SELECTION_PARAMS(FASTDEAN_FIELD_NAME)});
  structs["BitSumsParams"] = fields({FASTDEAN_BIT_SUMS_PARAMS(FASTDEAN_FIELD_NAME)});
  structs["CollapseParams"] = fields({FASTDEAN_COLLAPSE_PARAMS(FASTDEAN_FIELD_NAME)});
  m.attr("STRUCTS") = structs;
  m.attr("DTYPE_FLOAT16") = static_cast<int64_t>(fastdean::DType::kFloat16);
  m.attr("DTYPE_BFLOAT16") = static_cast<int64_t>(fastdean::DType::kBFloat16);
  m.attr("DTYPE_FLOAT32") = static_cast<int64_t>(fastdean::DType::kFloat32);
  m.attr("DTYPE_FLOAT64") = static_cast<int64_t>(fastdean::DType::kFloat64);

  // By the names that callers have for them.
  py::dict statistics;
  statistics["std"] = static_cast<int64_t>(fastdean::CollapseStatistic::kStd);
  statistics["cv"] = static_cast<int64_t>(fastdean::CollapseStatistic::kCv);
  statistics["mean"] = static_cast<int64_t>(fastdean::CollapseStatistic::kMean);
  m.attr("COLLAPSE_STATISTICS") = statistics;

  m.attr("CPU_LEVEL") = static_cast<int64_t>(fastdean::best_cpu_level());
  add_levels(m, "IMPORTANCE", fastdean::kImportanceLevels);
  add_levels(m, "SELECTION", fastdean::kSelectionLevels);
  add_levels(m, "COLLAPSE", fastdean::kCollapseLevels);

  using fastdean::CollapseParams, fastdean::ImportanceParams, fastdean::SelectionParams;
  using fastdean::ImportanceSelectionParams;
  def_workspace_bytes<ImportanceParams, fastdean::accumulate_importance_workspace_bytes>(
      m, "accumulate_importance_workspace_bytes");
  def_params_cpu<ImportanceParams, fastdean::accumulate_importance_cpu>(
      m, "accumulate_importance_cpu");
  def_workspace_bytes<SelectionParams, fastdean::select_top_workspace_bytes>(
      m, "select_top_workspace_bytes");
  def_params_cpu<SelectionParams, fastdean::select_top_cpu>(m, "select_top_cpu");
  def_workspace_bytes<ImportanceSelectionParams, fastdean::select_importance_workspace_bytes>(
      m, "select_importance_workspace_bytes");
  def_params_cpu<ImportanceSelectionParams, fastdean::select_importance_cpu>(
      m, "select_importance_cpu");
  def_params_cpu<fastdean::BitSumsParams, fastdean::bit_sums_cpu>(m, "bit_sums_cpu");
  def_workspace_bytes<CollapseParams, fastdean::collapse_workspace_bytes>(
      m, "collapse_workspace_bytes");
  def_params_cpu<CollapseParams, fastdean::collapse_alignment_cpu>(m, "collapse_alignment_cpu");
  def_params_cpu<CollapseParams, fastdean::collapse_alignment_backward_cpu>(
      m, "collapse_alignment_backward_cpu");

  def_places_cpu<fastdean::gather_at_cpu>(m, "gather_at_cpu");
  def_places_cpu<fastdean::write_at_cpu>(m, "write_at_cpu");
  def_places_cpu<fastdean::zero_at_cpu>(m, "zero_at_cpu");
#ifdef FASTDEAN_WITH_CUDA
  def_workspace_bytes<CollapseParams, fastdean::collapse_cuda_workspace_bytes>(
      m, "collapse_cuda_workspace_bytes");
  def_collapse_cuda<fastdean::collapse_alignment_cuda>(m, "collapse_alignment");
  def_collapse_cuda<fastdean::collapse_alignment_backward_cuda>(m, "collapse_alignment_backward");
  def_places_cuda<fastdean::gather_at_cuda>(m, "gather_at");
  def_places_cuda<fastdean::write_at_cuda>(m, "write_at");
  def_places_cuda<fastdean::zero_at_cuda>(m, "zero_at");
#endif
}
