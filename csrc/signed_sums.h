// What select_importance says of the entries that it has selected besides their importance.
#pragma once

#include <cstdint>

namespace fastdean {

// One of the two inputs.
struct SignedSource {
  int64_t data;
  int64_t stride_t;     // between rows, in elements
  int64_t stride_w;     // between columns, in elements
  const int64_t* rows;  // of each token; null: a token is its row
};

struct SignedSums {
  SignedSource x;
  SignedSource g;
  int64_t dtype;            // of x and g; not kFloat64
  const int64_t* segments;  // [num_segments, 2]: first token and end of each example
  int64_t num_segments;
  const int64_t* indices;  // [count], ascending flat indices of a weight with `columns` columns
  int64_t first_index;     // what its first entry has there
  int64_t count;
  int64_t columns;
  float* result;  // [count]: sum over all tokens t of g[t, row] x[t, column]
};

// Adds in fp64, in one order, whatever the number of workers.
void write_signed_sums(const SignedSums& asked, int64_t num_workers);

}  // namespace fastdean
