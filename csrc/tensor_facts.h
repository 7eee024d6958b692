// Where tensors lie and how, read from Python objects through the C functions of DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// One tensor's type object, address, device type and number, dtype, rank, shape and strides.
constexpr int kFactFields = 6 + 2 * kMaxRank;

// Args: api: the capsule `torch.Tensor.__dlpack_c_exchange_api__`; tensors: a list of torch.Tensor;
// facts: address of int64 [len(tensors), kFactFields], written.
// Throws: std::invalid_argument or what torch raises for tensors that cannot be described.
void read_facts(const pybind11::capsule& api, const pybind11::list& tensors, int64_t facts);

// Whether reading the facts of `tensors` now would write what stands there. Objects of other types
// than those that were read are told apart before they are touched.
bool same_facts(const pybind11::capsule& api, const pybind11::list& tensors, int64_t facts);

}  // namespace fastdean
