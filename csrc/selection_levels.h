// The scan for entries of high importance, and the instruction sets that it exists for.
#pragma once

#include <cstdint>

#include "fastdean.h"

namespace fastdean {

// Ascending; all that this build has a scan for. A newer processor takes the last one.
constexpr CpuLevel kSelectionLevels[] = {
    CpuLevel::kPortable,
#ifdef FASTDEAN_X86_LEVELS
    CpuLevel::kAvx2,
#endif
};

constexpr int64_t kGroup = 64;

// Among entries `first` to `end`, which lie side by side: where the first group of up to kGroup
// begins that has a product of at least `least`, or one that is infinite or NaN; `end` if there is
// none. `products` fp32 [kGroup] receives that group's: sum * |weight|, rounded to fp32.
using Scan = int64_t (*)(const float* sums, const void* weight, int64_t first, int64_t end,
                         float least, float* products);

struct Scans {
  Scan of[4];       // by the DType of the weight
  Scan unweighted;  // a product is the sum
};

// Defined by the file that is compiled for the level; x86-64 only.
Scans avx2_scans();

}  // namespace fastdean
