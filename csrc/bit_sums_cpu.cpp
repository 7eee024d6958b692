// bit_sums on the CPU.
//
// Each worker takes some of the rows and has column sums of its own. Sums of whole numbers modulo 2^64
// are the same in any order, so that the number of workers changes nothing.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fastdean.h"
#include "parallel.h"

namespace fastdean {
namespace {

// Column sums of so many columns stay in the first-level cache while all rows pass.
constexpr int64_t kBlockColumns = 1024;

struct Job {
  const BitSumsParams& params;
};

// What a row of a block, or a column of kMostRows rows, sums to without overflow.
template <class Bits>
struct Narrow {
  using Sum = int32_t;
  static constexpr int64_t kMostRows = 1 << 15;
};
template <>
struct Narrow<int32_t> {
  using Sum = int64_t;
  static constexpr int64_t kMostRows = int64_t{1} << 31;
};
// Wraps, as the whole sum does.
template <>
struct Narrow<int64_t> {
  using Sum = uint64_t;
  static constexpr int64_t kMostRows = int64_t{1} << 31;
};

// memcpy, because nothing promises aligned storage.
template <class Bits>
typename Narrow<Bits>::Sum value_at(const char* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return static_cast<typename Narrow<Bits>::Sum>(bits);
}

template <class Bits>
void add_rows(const BitSumsParams& p, int64_t first, int64_t end, uint64_t* of_columns) {
  using Sum = typename Narrow<Bits>::Sum;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(Bits));
  const auto* bits = reinterpret_cast<const char*>(p.bits);
  auto* of_rows = reinterpret_cast<uint64_t*>(p.of_rows);
  Sum block[kBlockColumns];
  for (int64_t c = 0; c < p.columns; c += kBlockColumns) {
    const int64_t width = std::min(kBlockColumns, p.columns - c);
    for (int64_t r = first; r < end;) {
      const int64_t until = std::min(end, r + Narrow<Bits>::kMostRows);
      std::fill(block, block + width, Sum{0});
      for (; r < until; ++r) {
        const char* row = bits + (r * p.stride_r + c * p.stride_c) * kBytes;
        Sum total = 0;
        if (p.stride_c == 1) {
          for (int64_t w = 0; w < width; ++w) {
            const Sum value = value_at<Bits>(row + w * kBytes);
            block[w] += value;
            total += value;
          }
        } else {
          for (int64_t w = 0; w < width; ++w) {
            const Sum value = value_at<Bits>(row + w * p.stride_c * kBytes);
            block[w] += value;
            total += value;
          }
        }
        of_rows[r] += static_cast<uint64_t>(static_cast<int64_t>(total));
      }
      for (int64_t w = 0; w < width; ++w) {
        of_columns[c + w] += static_cast<uint64_t>(static_cast<int64_t>(block[w]));
      }
    }
  }
}

void take_part(void* context, int64_t worker) {
  const BitSumsParams& p = static_cast<const Job*>(context)->params;
  const int64_t first = p.rows * worker / p.num_workers;
  const int64_t end = p.rows * (worker + 1) / p.num_workers;
  auto* of_columns = reinterpret_cast<uint64_t*>(p.of_columns) + worker * p.columns;
  switch (p.bytes) {
    case 1:
      return add_rows<int8_t>(p, first, end, of_columns);
    case 2:
      return add_rows<int16_t>(p, first, end, of_columns);
    case 4:
      return add_rows<int32_t>(p, first, end, of_columns);
    default:
      return add_rows<int64_t>(p, first, end, of_columns);
  }
}

}  // namespace

Status bit_sums_cpu(const BitSumsParams& params) {
  if (params.bytes != 1 && params.bytes != 2 && params.bytes != 4 && params.bytes != 8) {
    return Status::kUnknownDType;
  }
  Job job{params};
  run_workers(params.num_workers, take_part, &job);
  return Status::kOk;
}

}  // namespace fastdean
