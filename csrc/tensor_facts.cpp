#include "tensor_facts.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace py = pybind11;

namespace fastdean {
namespace {

// DLPack's stable C interface, version 1, as far as it is read here (github.com/dmlc/dlpack).
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t version_major;
  uint32_t version_minor;
  void* previous_api;
  void (*unused[3])();
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

const ExchangeApi& checked_api(const py::capsule& capsule) {
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version_major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::invalid_argument("api must be DLPack 1 with a function that describes a tensor");
  }
  return *api;
}

using Facts = std::array<int64_t, kFactFields>;

// False with a Python exception set for a tensor that cannot be described.
bool read_one(const ExchangeApi& api, PyObject* tensor, Facts& facts) {
  DLTensor found;
  if (api.dltensor_from_py_object_no_sync(tensor, &found) != 0) return false;
  if (found.ndim > kMaxRank) {
    PyErr_SetString(PyExc_ValueError, "a tensor has too many dimensions");
    return false;
  }
  facts.fill(0);
  facts[0] = reinterpret_cast<int64_t>(Py_TYPE(tensor));
  facts[1] = reinterpret_cast<int64_t>(found.data) + static_cast<int64_t>(found.byte_offset);
  facts[2] = found.device_type;
  facts[3] = found.device_id;
  facts[4] = found.dtype_code << 24 | found.dtype_bits << 16 | found.dtype_lanes;
  facts[5] = found.ndim;
  std::copy_n(found.shape, found.ndim, facts.begin() + 6);
  std::copy_n(found.strides, found.ndim, facts.begin() + 6 + kMaxRank);
  return true;
}

}  // namespace

void read_facts(const py::capsule& capsule, const py::list& tensors, int64_t facts) {
  const ExchangeApi& api = checked_api(capsule);
  auto* rows = reinterpret_cast<Facts*>(facts);
  for (const py::handle tensor : tensors) {
    if (!read_one(api, tensor.ptr(), *rows++)) throw py::error_already_set();
  }
}

bool same_facts(const py::capsule& capsule, const py::list& tensors, int64_t facts) {
  const ExchangeApi& api = checked_api(capsule);
  const auto* rows = reinterpret_cast<const Facts*>(facts);
  Facts now;
  for (const py::handle tensor : tensors) {
    const Facts& before = *rows++;
    // Another type may be no tensor at all, which torch's function does not check.
    if (reinterpret_cast<int64_t>(Py_TYPE(tensor.ptr())) != before[0]) return false;
    if (!read_one(api, tensor.ptr(), now)) {
      PyErr_Clear();
      return false;
    }
    if (now != before) return false;
  }
  return true;
}

}  // namespace fastdean
