// zero_at on the CPU. One thread: a mask holds tens of indices per tensor, and starting a second
// thread costs more than writing them.
#include <cstring>

#include "fastdean.h"

namespace fastdean {
namespace {

Status check_row(const ZeroAtRow& row) {
  if (element_bytes(row.dtype) == 0) return Status::kUnknownDType;
  if (row.rank < 0 || row.rank > kMaxRank) return Status::kRankTooLarge;
  const auto* indices = reinterpret_cast<const int64_t*>(row.indices);
  for (int64_t i = 0; i < row.count; ++i) {
    if (indices[i] < 0 || indices[i] >= row.numel) return Status::kIndexOutOfRange;
  }
  return Status::kOk;
}

void zero_row(const ZeroAtRow& row) {
  const int bytes = element_bytes(row.dtype);
  const auto* indices = reinterpret_cast<const int64_t*>(row.indices);
  auto* data = reinterpret_cast<char*>(row.data);
  for (int64_t i = 0; i < row.count; ++i) {
    std::memset(data + element_offset(row, indices[i]) * bytes, 0, static_cast<size_t>(bytes));
  }
}

}  // namespace

Status zero_at_cpu(const ZeroAtParams& params) {
  // All rows before the first write, so that a refused call leaves every tensor as it was.
  for (int64_t i = 0; i < params.num_rows; ++i) {
    const Status status = check_row(params.rows[i]);
    if (status != Status::kOk) return status;
  }
  for (int64_t i = 0; i < params.num_rows; ++i) zero_row(params.rows[i]);
  return Status::kOk;
}

}  // namespace fastdean
