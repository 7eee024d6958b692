// gather_at, write_at and zero_at against a list of where every element lies; compiled with the
// sanitizers, so that a read or write outside its memory, or undefined behaviour, ends it. An
// argument asks for a few of the cases only.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "entry_points.h"
#include "fastdean.h"

namespace {

using fastdean::DType;
using fastdean::PlacesParams;
using fastdean::PlacesRow;
using fastdean::Status;
using Bytes = std::vector<char>;

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements

  // The offset of every element in row-major order, by counting up one dimension after another.
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> found = {0};
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      std::vector<int64_t> longer;
      for (const int64_t offset : found) {
        for (int64_t i = 0; i < sizes[dim]; ++i) longer.push_back(offset + i * strides[dim]);
      }
      found = longer;
    }
    return found;
  }

  bool contiguous() const { return sizes.size() == 1 && strides[0] == 1; }
};

const Layout kContiguous = {{101}, {1}};
const Layout kOneElement = {{1}, {1}};
const Layout kEvery3rd = {{34}, {3}};
const Layout kTransposed = {{9, 14}, {1, 9}};
const Layout kSomeColumns = {{13, 7}, {11, 1}};
const Layout kPermuted = {{3, 5, 4}, {4, 12, 1}};
const Layout kMaxRankLayout = {{2, 1, 3, 2, 1, 2, 2, 3}, {144, 9, 48, 24, 7, 12, 6, 2}};
const Layout kEmpty = {{0}, {1}};

std::mt19937 random_bits(11);

Bytes random_bytes(int64_t count) {
  Bytes bytes(count);
  for (char& byte : bytes) byte = static_cast<char>(random_bits());
  return bytes;
}

// A row of a table with the memory it names: exactly as large as it must be, one byte further is
// somebody else's. Every dtype is bits to the mask operations, so these are random: NaN and both
// zeros among them.
struct Tensor {
  DType dtype;
  Layout layout;
  std::vector<int64_t> indices;
  int64_t width;
  int64_t shift;  // bytes before the first element, for a tensor that is not aligned
  std::vector<int64_t> offsets;
  Bytes memory, values;

  Tensor(DType dtype, const Layout& layout, int64_t count, int64_t shift)
      : dtype(dtype),
        layout(layout),
        width(fastdean::element_bytes(static_cast<int64_t>(dtype))),
        // No GPU reads an element that is not aligned.
        shift(entry_points::kOnCuda ? shift / width * width : shift),
        offsets(layout.offsets()) {
    indices.resize(offsets.size());
    std::iota(indices.begin(), indices.end(), 0);
    std::shuffle(indices.begin(), indices.end(), random_bits);
    indices.resize(count);
    indices.shrink_to_fit();
    const int64_t last = offsets.empty() ? -1 : *std::max_element(offsets.begin(), offsets.end());
    memory = random_bytes(shift + (last + 1) * width);
    values = random_bytes(shift + count * width);
  }

  int64_t count() const { return static_cast<int64_t>(indices.size()); }
  char* place(int64_t i) { return memory.data() + shift + offsets[indices[i]] * width; }
  char* value(int64_t i) { return values.data() + shift + i * width; }

  PlacesRow row(bool with_values) {
    PlacesRow row{};
    row.data = reinterpret_cast<int64_t>(memory.data() + shift);
    row.indices = reinterpret_cast<int64_t>(indices.data());
    if (with_values) row.values = reinterpret_cast<int64_t>(values.data() + shift);
    row.count = count();
    row.numel = static_cast<int64_t>(offsets.size());
    row.dtype = static_cast<int64_t>(dtype);
    if (layout.contiguous()) return row;
    row.rank = static_cast<int64_t>(layout.sizes.size());
    std::copy(layout.sizes.begin(), layout.sizes.end(), row.sizes);
    std::copy(layout.strides.begin(), layout.strides.end(), row.strides);
    return row;
  }
};

struct Table {
  std::string name;
  std::vector<Tensor> tensors;

  std::vector<Bytes> memories() const {
    std::vector<Bytes> all;
    for (const Tensor& tensor : tensors) all.push_back(tensor.memory);
    return all;
  }

  std::vector<PlacesRow> rows(bool with_values) {
    std::vector<PlacesRow> all;
    for (Tensor& tensor : tensors) all.push_back(tensor.row(with_values));
    all.shrink_to_fit();
    return all;
  }
};

PlacesParams params_of(const std::vector<PlacesRow>& rows, int64_t workers) {
  PlacesParams params{rows.data(), static_cast<int64_t>(rows.size()), 0, workers};
  for (const PlacesRow& row : rows) params.max_count = std::max(params.max_count, row.count);
  return params;
}

// Like write_at, in a copy: element by element, at the listed places.
std::vector<Bytes> written(Table table) {
  for (Tensor& tensor : table.tensors) {
    for (int64_t i = 0; i < tensor.count(); ++i) {
      std::memcpy(tensor.place(i), tensor.value(i), tensor.width);
    }
  }
  return table.memories();
}

std::vector<Bytes> zeroed(Table table) {
  for (Tensor& tensor : table.tensors) {
    for (int64_t i = 0; i < tensor.count(); ++i) std::memset(tensor.place(i), 0, tensor.width);
  }
  return table.memories();
}

Bytes gathered(Tensor& tensor) {
  Bytes found(tensor.shift);
  for (int64_t i = 0; i < tensor.count(); ++i) {
    found.insert(found.end(), tensor.place(i), tensor.place(i) + tensor.width);
  }
  found.shrink_to_fit();
  return found;
}

void check_gather_write_zero(Table table, int64_t workers, const std::string& where) {
  const auto before = table.memories();
  auto rows = table.rows(true);
  expect(entry_points::gather_at(params_of(rows, workers)) == Status::kOk,
         where + ": gather_at refused");
  expect(table.memories() == before, where + ": gather_at wrote to the tensors");
  for (Tensor& tensor : table.tensors) {
    const Bytes right = gathered(tensor);
    expect(
        std::equal(right.begin() + tensor.shift, right.end(), tensor.values.begin() + tensor.shift),
        where + ": gather_at found other values");
    tensor.values = random_bytes(static_cast<int64_t>(tensor.values.size()));
  }

  const auto after_write = written(table);
  rows = table.rows(true);
  expect(entry_points::write_at(params_of(rows, workers)) == Status::kOk,
         where + ": write_at refused");
  expect(table.memories() == after_write, where + ": write_at left other bits");

  const auto after_zero = zeroed(table);
  rows = table.rows(false);
  expect(entry_points::zero_at(params_of(rows, workers)) == Status::kOk,
         where + ": zero_at refused");
  expect(table.memories() == after_zero, where + ": zero_at left other bits");
}

// Every operation refuses the rows and writes nothing, to tensors or values.
void check_refused(const Table& table, const std::vector<PlacesRow>& rows, Status right,
                   const std::string& what) {
  const Table before = table;
  const auto params = params_of(rows, 1);
  expect(entry_points::gather_at(params) == right, what + ": gather_at");
  expect(entry_points::write_at(params) == right, what + ": write_at");
  expect(entry_points::zero_at(params) == right, what + ": zero_at");
  expect(table.memories() == before.memories(), what + ": the tensors have changed");
  for (size_t r = 0; r < table.tensors.size(); ++r) {
    expect(table.tensors[r].values == before.tensors[r].values, what + ": the values have changed");
  }
}

void check_refusals() {
  Table table{"refused", {}};
  for (const DType dtype : kDTypes) table.tensors.emplace_back(dtype, kTransposed, 20, 0);
  Tensor& last = table.tensors.back();
  const auto good = table.rows(true);
  const auto with = [&](int64_t PlacesRow::* field, int64_t value) {
    auto rows = good;
    rows.back().*field = value;
    return rows;
  };
  check_refused(table, with(&PlacesRow::dtype, 4), Status::kUnknownDType, "dtype 4");
  check_refused(table, with(&PlacesRow::dtype, -1), Status::kUnknownDType, "dtype -1");
  check_refused(table, with(&PlacesRow::rank, fastdean::kMaxRank + 1), Status::kRankTooLarge,
                "rank 9");
  check_refused(table, with(&PlacesRow::rank, -1), Status::kRankTooLarge, "rank -1");
  for (const int64_t index : {int64_t{-1}, static_cast<int64_t>(last.offsets.size())}) {
    last.indices.back() = index;
    check_refused(table, good, Status::kIndexOutOfRange, "index " + std::to_string(index));
  }
}

// A tensor of 2^35 elements that are four in memory.
void check_expanded() {
  std::vector<uint16_t> memory = {7, 8, 9, 10}, values(4);
  const std::vector<int64_t> indices = {0, (int64_t{1} << 34) + 1, 2, (int64_t{1} << 35) - 1};
  PlacesRow row{};
  row.data = reinterpret_cast<int64_t>(memory.data());
  row.indices = reinterpret_cast<int64_t>(indices.data());
  row.values = reinterpret_cast<int64_t>(values.data());
  row.count = 4;
  row.numel = int64_t{1} << 35;
  row.rank = 2;
  row.sizes[0] = int64_t{1} << 33;
  row.sizes[1] = 4;
  row.strides[1] = 1;
  expect(entry_points::gather_at({&row, 1, 4, 1}) == Status::kOk, "expanded: refused");
  expect(values == memory, "expanded: gather_at found other values");
}

Table every_layout() {
  Table table{"every dtype and layout", {}};
  int64_t shift = 0;
  for (const Layout& layout : {kContiguous, kOneElement, kEvery3rd, kTransposed, kSomeColumns,
                               kPermuted, kMaxRankLayout, kEmpty}) {
    const auto numel = static_cast<int64_t>(layout.offsets().size());
    for (const DType dtype : kDTypes) {
      table.tensors.emplace_back(dtype, layout, numel, shift);
      table.tensors.emplace_back(dtype, layout, numel / 2, shift);
      table.tensors.emplace_back(dtype, layout, 0, shift);
      shift = (shift + 3) % 8;
    }
  }
  return table;
}

// Enough indices for three workers, whose parts begin and end within rows.
Table three_parts() {
  Table table{"three parts", {}};
  const Layout wide = {{150, 200}, {1, 150}}, flat = {{25000}, {1}};
  table.tensors.emplace_back(DType::kFloat32, kEmpty, 0, 0);
  table.tensors.emplace_back(DType::kFloat16, wide, 21000, 0);
  table.tensors.emplace_back(DType::kFloat64, kOneElement, 1, 0);
  table.tensors.emplace_back(DType::kFloat32, kContiguous, 0, 0);
  table.tensors.emplace_back(DType::kFloat64, flat, 25000, 0);
  table.tensors.emplace_back(DType::kBFloat16, wide, 8000, 0);
  return table;
}

// More indices than a grid has threads, which walk on.
Table wider_than_a_grid() {
  Table table{"wider than a grid", {}};
  table.tensors.emplace_back(DType::kFloat16, Layout{{140000}, {1}}, 140000, 0);
  return table;
}

// More rows than a grid has blocks beside each other.
Table more_rows_than_a_grid() {
  Table table{"more rows than a grid", {}};
  for (int i = 0; i < 65540; ++i) table.tensors.emplace_back(DType::kFloat32, kOneElement, 1, 0);
  return table;
}

}  // namespace

int main(int count, char**) {
  const Table tables[] = {
      {"no rows", {}},     {"an empty list", {Tensor(DType::kFloat32, kContiguous, 0, 0)}},
      every_layout(),      three_parts(),
      wider_than_a_grid(),
      // Each on its line.
  };
  const bool few = count > 1;
  for (const Table& table : tables) {
    for (const int64_t workers : {1, 2, 3, 8}) {
      if (workers > 1 && few) break;
      const std::string where = table.name + ", " + std::to_string(workers) + " workers";
      check_gather_write_zero(table, workers, where);
    }
  }
  if (!entry_points::kOnCuda) check_refusals();
  if (entry_points::kOnCuda && !few) {
    check_gather_write_zero(more_rows_than_a_grid(), 1, "more rows than a grid");
  }
  check_expanded();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
