// A tensor's place in memory, its shape and dtype, read through DLPack's C functions. Python's objects
// and the table of functions pass through as addresses, so no Python is needed.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// A tensor's address, device type and number, dtype, rank, shape and strides.
constexpr int kFactFields = 5 + 2 * kMaxRank;

// Whether the table at `api` is one that read_facts can use.
bool describes_tensors(const void* api);

// Writes `facts`, int64 [kFactFields], about the Python object `tensor`, of the type that `api`
// belongs to. Needs the GIL. False for more than kMaxRank dimensions, and with a Python exception set
// for a tensor that DLPack cannot describe.
bool read_facts(const void* api, void* tensor, int64_t* facts);

}  // namespace fastdean
