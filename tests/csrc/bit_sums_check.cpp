// bit_sums_cpu against sums entry by entry; compiled with the sanitizers, so that a read or write
// outside its memory, or undefined behaviour, ends it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fastdean.h"

namespace {

// In entries; the matrix begins `shift` bytes into its memory, which need not be aligned.
struct Case {
  int64_t rows, columns, stride_r, stride_c, shift;
};

int64_t entry(const char* from, int64_t bytes) {
  int64_t value = 0;
  std::memcpy(&value, from, bytes);
  const int64_t unused = 64 - 8 * bytes;
  return static_cast<int64_t>(static_cast<uint64_t>(value) << unused) >> unused;
}

bool is_right(const Case& c, int64_t bytes, int64_t num_workers) {
  const int64_t extent =
      c.rows * c.columns == 0 ? 0 : (c.rows - 1) * c.stride_r + (c.columns - 1) * c.stride_c + 1;
  // Exactly as large as it must be.
  std::vector<char> memory(c.shift + extent * bytes);
  std::mt19937 random(7);
  for (char& each : memory) each = static_cast<char>(random() % 3 == 0 ? 0x80 : random());
  std::vector<uint64_t> rows(c.rows), columns(c.columns);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t k = 0; k < c.columns; ++k) {
      const int64_t at = r * c.stride_r + k * c.stride_c;
      const auto value = static_cast<uint64_t>(entry(memory.data() + c.shift + at * bytes, bytes));
      rows[r] += value;
      columns[k] += value;
    }
  }
  std::vector<uint64_t> of_rows(c.rows), of_columns(num_workers * c.columns);
  fastdean::BitSumsParams params{};
  params.bits = reinterpret_cast<int64_t>(memory.data() + c.shift);
  params.stride_r = c.stride_r;
  params.stride_c = c.stride_c;
  params.bytes = bytes;
  params.rows = c.rows;
  params.columns = c.columns;
  params.of_rows = reinterpret_cast<int64_t>(of_rows.data());
  params.of_columns = reinterpret_cast<int64_t>(of_columns.data());
  params.num_workers = num_workers;
  if (fastdean::bit_sums_cpu(params) != fastdean::Status::kOk) return false;
  for (int64_t w = 1; w < num_workers; ++w) {
    for (int64_t k = 0; k < c.columns; ++k) of_columns[k] += of_columns[w * c.columns + k];
  }
  of_columns.resize(c.columns);
  return of_rows == rows && of_columns == columns;
}

}  // namespace

int main() {
  const Case cases[] = {{0, 3, 3, 1, 0},       {3, 0, 0, 1, 0},       {1, 1, 1, 1, 0},
                        {5, 1023, 1023, 1, 0}, {5, 1024, 1030, 1, 1}, {3, 1025, 1025, 1, 3},
                        {7, 9, 1, 7, 0},       {4, 2049, 2, 11, 1},   {33000, 2, 2, 1, 0}};
  for (const Case& c : cases) {
    for (const int64_t bytes : {1, 2, 4, 8}) {
      for (const int64_t num_workers : {1, 2, 5}) {
        if (is_right(c, bytes, num_workers)) continue;
        std::printf("%lld x %lld of %lld bytes by %lld workers: other sums\n",
                    static_cast<long long>(c.rows), static_cast<long long>(c.columns),
                    static_cast<long long>(bytes), static_cast<long long>(num_workers));
        return 1;
      }
    }
  }
  fastdean::BitSumsParams params{};
  params.bytes = 3;
  return fastdean::bit_sums_cpu(params) == fastdean::Status::kUnknownDType ? 0 : 1;
}
