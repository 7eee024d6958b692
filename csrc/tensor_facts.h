// Where a tensor lies and how, read through the C functions of DLPack from what only Python can
// name. No Python is needed for it: objects and the table of functions pass through as addresses.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// A tensor's address, device type and number, dtype, rank, shape and strides.
constexpr int kFactFields = 5 + 2 * kMaxRank;

// Whether the table at `api` is one that read_facts can use.
bool describes_tensors(const void* api);

// Writes `facts`, int64 [kFactFields], about the Python object `tensor`, which must be of the type
// that `api` belongs to. Needs the GIL. False for a tensor of more than kMaxRank dimensions, and
// with a Python exception set for one that cannot be described.
bool read_facts(const void* api, void* tensor, int64_t* facts);

}  // namespace fastdean
