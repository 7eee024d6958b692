// Compiled with AVX2 and FMA, which the compiler uses by itself; called only where the processor
// has both.
#include "collapse_rows.h"

namespace fastdean {

void avx2_collapse_loops(CollapseLoops<float>* loops) { set_all_loops(loops); }
void avx2_collapse_loops(CollapseLoops<double>* loops) { set_all_loops(loops); }

}  // namespace fastdean
