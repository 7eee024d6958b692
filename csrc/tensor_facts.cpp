#include "tensor_facts.h"

#include <algorithm>

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

}  // namespace

bool describes_tensors(const void* api) {
  const auto* functions = static_cast<const ExchangeApi*>(api);
  return functions->version_major == 1 && functions->dltensor_from_py_object_no_sync != nullptr;
}

bool read_facts(const void* api, void* tensor, int64_t* facts) {
  DLTensor found;
  const auto* functions = static_cast<const ExchangeApi*>(api);
  if (functions->dltensor_from_py_object_no_sync(tensor, &found) != 0) return false;
  if (found.ndim > kMaxRank) return false;
  std::fill_n(facts, kFactFields, 0);
  facts[0] = reinterpret_cast<int64_t>(found.data) + static_cast<int64_t>(found.byte_offset);
  facts[1] = found.device_type;
  facts[2] = found.device_id;
  facts[3] = found.dtype_code << 24 | found.dtype_bits << 16 | found.dtype_lanes;
  facts[4] = found.ndim;
  std::copy_n(found.shape, found.ndim, facts + 5);
  std::copy_n(found.strides, found.ndim, facts + 5 + kMaxRank);
  return true;
}

}  // namespace fastdean
