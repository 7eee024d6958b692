// Compiled with AVX2 and F16C, which every processor with AVX2 has; called only where it has that.
#include "selection_scan.h"

namespace fastdean {

Scans avx2_scans() { return scans(); }

}  // namespace fastdean
