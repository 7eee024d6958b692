// gather_at, write_at and zero_at on the CPU.
#include <algorithm>
#include <cstring>

#include "fastdean.h"
#include "parallel.h"

namespace fastdean {
namespace {

// Starting a thread costs more than thousands of indices. A mask of weights holds tens per tensor, a
// mask of units millions.
constexpr int64_t kLeastPerWorker = 16384;

Status check_row(const PlacesRow& row) {
  if (element_bytes(row.dtype) == 0) return Status::kUnknownDType;
  if (row.rank < 0 || row.rank > kMaxRank) return Status::kRankTooLarge;
  const auto* indices = reinterpret_cast<const int64_t*>(row.indices);
  for (int64_t i = 0; i < row.count; ++i) {
    if (indices[i] < 0 || indices[i] >= row.numel) return Status::kIndexOutOfRange;
  }
  return Status::kOk;
}

// Before the first write, so that a refused call leaves every tensor unchanged.
Status check_rows(const PlacesParams& params) {
  for (int64_t r = 0; r < params.num_rows; ++r) {
    const Status status = check_row(params.rows[r]);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

// The elements of one row from `first` to before `last`, as integers of its width: every
// dtype is copied by its bits. memcpy, because nothing promises aligned storage.
template <typename Bits>
struct Elements {
  char* data;
  const int64_t* indices;
  char* values;
  const PlacesRow& row;

  explicit Elements(const PlacesRow& row)
      : data(reinterpret_cast<char*>(row.data)),
        indices(reinterpret_cast<const int64_t*>(row.indices)),
        values(reinterpret_cast<char*>(row.values)),
        row(row) {}

  char* place(int64_t i) const {
    return data + element_offset(row, indices[i]) * static_cast<int64_t>(sizeof(Bits));
  }

  static Bits read(const char* from, int64_t i = 0) {
    Bits bits;
    std::memcpy(&bits, from + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    return bits;
  }

  static void write(char* to, Bits bits, int64_t i = 0) {
    std::memcpy(to + i * static_cast<int64_t>(sizeof(Bits)), &bits, sizeof(Bits));
  }
};

struct Gather {
  template <typename Bits>
  void operator()(const Elements<Bits>& e, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) e.write(e.values, e.read(e.place(i)), i);
  }
};

struct Write {
  template <typename Bits>
  void operator()(const Elements<Bits>& e, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) e.write(e.place(i), e.read(e.values, i));
  }
};

struct Zero {
  template <typename Bits>
  void operator()(const Elements<Bits>& e, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) e.write(e.place(i), 0);
  }
};

template <typename Act>
struct Job {
  const PlacesParams& params;
  int64_t total;
  int64_t num_workers;
  const Act& act;
};

// Worker w takes the w-th of equal parts of all elements, whichever rows they lie in.
template <typename Act>
void take_part(void* context, int64_t worker) {
  const auto& job = *static_cast<const Job<Act>*>(context);
  const int64_t begin = job.total * worker / job.num_workers;
  const int64_t end = job.total * (worker + 1) / job.num_workers;
  int64_t before = 0;
  for (int64_t r = 0; r < job.params.num_rows && before < end; ++r) {
    const PlacesRow& row = job.params.rows[r];
    const int64_t first = std::max<int64_t>(begin - before, 0);
    const int64_t last = std::min(end - before, row.count);
    before += row.count;
    if (first >= last) continue;
    switch (element_bytes(row.dtype)) {
      case 2:
        job.act(Elements<uint16_t>(row), first, last);
        break;
      case 4:
        job.act(Elements<uint32_t>(row), first, last);
        break;
      default:
        job.act(Elements<uint64_t>(row), first, last);
    }
  }
}

template <typename Act>
void for_all(const PlacesParams& params, const Act& act) {
  int64_t total = 0;
  for (int64_t r = 0; r < params.num_rows; ++r) total += params.rows[r].count;
  const int64_t most = std::max<int64_t>(1, total / kLeastPerWorker);
  const int64_t num_workers = std::min(most, std::max<int64_t>(1, params.num_workers));
  Job<Act> job{params, total, num_workers, act};
  run_workers(num_workers, &take_part<Act>, &job);
}

template <typename Act>
Status checked(const PlacesParams& params, const Act& act) {
  const Status status = check_rows(params);
  if (status == Status::kOk) for_all(params, act);
  return status;
}

}  // namespace

Status gather_at_cpu(const PlacesParams& params) { return checked(params, Gather{}); }

Status write_at_cpu(const PlacesParams& params) { return checked(params, Write{}); }

Status zero_at_cpu(const PlacesParams& params) { return checked(params, Zero{}); }

}  // namespace fastdean
