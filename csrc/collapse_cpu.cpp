// The collapse-alignment loss and its backward on the CPU.
//
// A stable counting sort orders the labelled rows by class, and the [classes, columns] plane is cut
// into tiles. One pass adds each tile's rows to its class sums and its means to a partial centre; a
// second pass gives the products of the cosines. The backward takes one pass for the weight, two for
// the features. Tiles depend on sizes alone, one worker computes each in one order, and partial
// results are added in the order of the tiles: the number of workers does not change the result.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "collapse_levels.h"
#include "collapse_rows.h"
#include "fastdean.h"
#include "parallel.h"

namespace fastdean {
namespace {

constexpr int64_t kBlockClasses = 32;
constexpr int64_t kSliceColumns = 1024;
constexpr int64_t kRowsPerFill = 256;
constexpr int64_t kAlignment = 64;
// With fewer elements a second thread costs more than it saves.
constexpr int64_t kLeastElementsPerWorker = 1 << 16;
// Stands for a weight's squared length where the class has no cosine, and so no gradient.
constexpr double kNoCosine = -1;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How the plane is cut, and where in the workspace each array begins, in bytes.
struct Workspace {
  int64_t blocks;
  int64_t slices;
  int64_t starts;    // int64 [classes + 2]: first of each class in `order`, of unlabelled rows, end
  int64_t order;     // int64 [rows], by class, then the unlabelled
  int64_t partial;   // T [blocks, columns]
  int64_t average;   // T [columns]
  int64_t products;  // Products [slices, classes]
  int64_t scratch;   // T [num_workers, 2, kSliceColumns]
  int64_t bytes;
};

Workspace workspace_of(const CollapseParams& p) {
  Workspace workspace{};
  workspace.blocks = divide_up(p.classes, kBlockClasses);
  workspace.slices = divide_up(p.columns, kSliceColumns);
  const int64_t element = element_bytes(p.sums_dtype);
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t start = end;
    end += divide_up(bytes, kAlignment) * kAlignment;
    return start;
  };
  workspace.starts = take((p.classes + 2) * 8);
  workspace.order = take(p.rows * 8);
  workspace.partial = take(workspace.blocks * p.columns * element);
  workspace.average = take(p.columns * element);
  workspace.products = take(workspace.slices * p.classes * static_cast<int64_t>(sizeof(Products)));
  workspace.scratch = take(p.num_workers * 2 * kSliceColumns * element);
  workspace.bytes = end;
  return workspace;
}

template <class T>
CollapseLoops<T> loops_of(int64_t level) {
  CollapseLoops<T> loops;
  switch (highest_level(kCollapseLevels, static_cast<CpuLevel>(level))) {
#ifdef FASTDEAN_X86_LEVELS
    case CpuLevel::kAvx2:
      avx2_collapse_loops(&loops);
      break;
#endif
    default:
      set_all_loops(&loops);
  }
  return loops;
}

// Classes [first, last) and columns [start, start + columns).
struct Tile {
  int64_t block;
  int64_t slice;
  int64_t first;
  int64_t last;
  int64_t start;
  int64_t columns;
};

template <class T>
class Collapse {
 public:
  explicit Collapse(const CollapseParams& p)
      : p_(p), workspace_(workspace_of(p)), loops_(loops_of<T>(p.level)) {
    auto* start = pointer<char>(p.workspace);
    starts_ = reinterpret_cast<int64_t*>(start + workspace_.starts);
    order_ = reinterpret_cast<int64_t*>(start + workspace_.order);
    partial_ = reinterpret_cast<T*>(start + workspace_.partial);
    average_ = reinterpret_cast<T*>(start + workspace_.average);
    products_ = reinterpret_cast<Products*>(start + workspace_.products);
    scratch_ = reinterpret_cast<T*>(start + workspace_.scratch);
    sums_ = pointer<T>(p.sums);
    counts_ = pointer<double>(p.counts);
    centre_ = pointer<T>(p.centre);
    factors_ = pointer<T>(p.factors);
  }

  Status forward() {
    if (!sort_rows()) return Status::kIndexOutOfRange;
    join_counts();
    if (!in_place()) advise(p_.sums, p_.classes, p_.sums_dtype);
    average_out_ = centre_;
    const int64_t labelled = starts_[p_.classes];
    Phases phases(this);
    phases.add<&Collapse::join_sums>(tiles(), (labelled + 2 * p_.classes) * p_.columns);
    phases.add<&Collapse::average_slice>(workspace_.slices, workspace_.blocks * p_.columns);
    if (num_seen_ >= 2) phases.add<&Collapse::multiply>(tiles(), 2 * p_.classes * p_.columns);
    phases.run();
    finish();
    return Status::kOk;
  }

  Status backward() {
    if (p_.grad_features != 0 && !sort_rows()) return Status::kIndexOutOfRange;
    count_seen();
    grad_loss_ = *pointer<const T>(p_.grad_loss);
    average_out_ = average_;
    Phases phases(this);
    if (p_.grad_weight != 0) advise(p_.grad_weight, p_.classes, p_.weight_dtype);
    phases.add<&Collapse::weight_gradients>(tiles(), 3 * p_.classes * p_.columns);
    if (p_.grad_features != 0) {
      advise(p_.grad_features, p_.rows, p_.features_dtype);
      const int64_t labelled = starts_[p_.classes], unlabelled = p_.rows - labelled;
      phases.add<&Collapse::average_slice>(workspace_.slices, workspace_.blocks * p_.columns);
      phases.add<&Collapse::row_gradients>(tiles(), (labelled + 2 * p_.classes) * p_.columns);
      phases.add<&Collapse::clear_unlabelled>(divide_up(unlabelled, kRowsPerFill),
                                              unlabelled * p_.columns);
    }
    phases.run();
    return Status::kOk;
  }

 private:
  // Steps of the computation, with as many workers as the largest step is worth.
  class Phases {
   public:
    explicit Phases(Collapse* self) : self_(self) {}

    // step(item, worker) for every item, after all steps added before. `elements` is its size.
    template <void (Collapse::*step)(int64_t, int64_t)>
    void add(int64_t items, int64_t elements) {
      phases_[count_++] = {[](void* self, int64_t item, int64_t worker) {
                             (static_cast<Collapse*>(self)->*step)(item, worker);
                           },
                           items};
      elements_ = std::max(elements_, elements);
    }

    // step(tile, worker) for every tile.
    template <void (Collapse::*step)(const Tile&, int64_t)>
    void add(int64_t items, int64_t elements) {
      phases_[count_++] = {[](void* self, int64_t item, int64_t worker) {
                             auto* collapse = static_cast<Collapse*>(self);
                             (collapse->*step)(collapse->tile(item), worker);
                           },
                           items};
      elements_ = std::max(elements_, elements);
    }

    void run() {
      const int64_t workers =
          std::clamp<int64_t>(elements_ / kLeastElementsPerWorker, 1, self_->p_.num_workers);
      run_phases(workers, phases_, count_, self_);
    }

   private:
    Collapse* self_;
    Phase phases_[kMaxPhases];
    int64_t count_ = 0;
    int64_t elements_ = 0;
  };

  int64_t tiles() const { return workspace_.blocks * workspace_.slices; }

  Tile tile(int64_t item) const {
    const int64_t block = item / workspace_.slices, slice = item % workspace_.slices;
    const int64_t start = slice * kSliceColumns;
    return {block,
            slice,
            block * kBlockClasses,
            std::min((block + 1) * kBlockClasses, p_.classes),
            start,
            std::min(kSliceColumns, p_.columns - start)};
  }

  void advise(int64_t address, int64_t rows, int64_t dtype) const {
    advise_large_pages(pointer<void>(address), rows * p_.columns * element_bytes(dtype));
  }

  // The rows of every class in ascending order; false if a label is out of range.
  bool sort_rows() {
    const auto* labels = pointer<const int64_t>(p_.labels);
    std::fill(starts_, starts_ + p_.classes + 2, int64_t{0});
    for (int64_t t = 0; t < p_.rows; ++t) {
      if (labels[t] < -1 || labels[t] >= p_.classes) return false;
      starts_[list_of(labels[t]) + 1] += 1;
    }
    for (int64_t c = 0; c <= p_.classes; ++c) starts_[c + 1] += starts_[c];
    // Each start moves on to its list's end, which is the next list's start.
    for (int64_t t = 0; t < p_.rows; ++t) order_[starts_[list_of(labels[t])]++] = t;
    for (int64_t c = p_.classes + 1; c > 0; --c) starts_[c] = starts_[c - 1];
    starts_[0] = 0;
    return true;
  }

  int64_t list_of(int64_t label) const { return label < 0 ? p_.classes : label; }
  int64_t rows_of(int64_t c) const { return starts_[c + 1] - starts_[c]; }
  bool in_place() const { return p_.sums == p_.old_sums; }
  bool seen(int64_t c) const { return counts_[c] > 0; }
  T per_count(int64_t c) const { return seen(c) ? static_cast<T>(1.0 / counts_[c]) : T(0); }

  void join_counts() {
    const auto* old = pointer<const double>(p_.old_counts);
    decay_ = *pointer<const double>(p_.decay);
    for (int64_t c = 0; c < p_.classes; ++c) {
      const double kept = decay_ == 0 ? 0 : decay_ * old[c];
      const double count = kept + static_cast<double>(rows_of(c));
      counts_[c] = decay_ < 1 && count < kLeastCount ? 0 : count;
    }
    count_seen();
  }

  void count_seen() {
    num_seen_ = 0;
    for (int64_t c = 0; c < p_.classes; ++c) num_seen_ += seen(c);
  }

  T* scratch(int64_t worker, int64_t which) const {
    return scratch_ + (2 * worker + which) * kSliceColumns;
  }

  // Writes zeros only over other values, so that memory of classes never seen stays untouched.
  static void clear(T* row, int64_t columns) {
    const auto* bytes = reinterpret_cast<const char*>(row);
    const size_t size = static_cast<size_t>(columns) * sizeof(T);
    // All bytes are equal to the one before them, and the first one is 0.
    if (bytes[0] != 0 || std::memcmp(bytes, bytes + 1, size - 1) != 0) {
      std::fill(row, row + columns, T(0));
    }
  }

  void join_sums(const Tile& tile, int64_t worker) {
    const auto& features = loops_.features[p_.features_dtype];
    const char* data =
        pointer<const char>(p_.features) + tile.start * element_bytes(p_.features_dtype);
    T* total = partial_ + tile.block * p_.columns + tile.start;
    std::fill(total, total + tile.columns, T(0));
    for (int64_t c = tile.first; c < tile.last; ++c) {
      const int64_t place = c * p_.columns + tile.start;
      const T* old = pointer<const T>(p_.old_sums) + place;
      // A dropped or forgotten sum must not return as 0 * infinity.
      if (decay_ == 0 || !seen(c)) old = nullptr;
      T* batch = nullptr;
      if (rows_of(c) > 0) {
        batch = scratch(worker, 0);
        features.sum_rows(batch, data, p_.features_stride, order_ + starts_[c], rows_of(c),
                          starts_[tile.last] - starts_[c + 1], tile.columns);
      }
      T* added = seen(c) ? total : nullptr;
      if (in_place() && !seen(c) && rows_of(c) == 0) {
        clear(sums_ + place, tile.columns);
        continue;
      }
      if (old == nullptr || !in_place()) {
        loops_.join(sums_ + place, old, batch, added, static_cast<T>(decay_), per_count(c),
                    tile.columns);
      } else {
        loops_.join_in_place(sums_ + place, batch, added, static_cast<T>(decay_), per_count(c),
                             tile.columns);
      }
    }
  }

  // average_out_ [columns] = the sum of all blocks' partial rows / the number of classes seen.
  void average_slice(int64_t slice, int64_t) {
    const int64_t start = slice * kSliceColumns;
    const int64_t end = std::min(start + kSliceColumns, p_.columns);
    const double number = static_cast<double>(std::max<int64_t>(num_seen_, 1));
    constexpr int64_t kTogether = 64;
    for (int64_t first = start; first < end; first += kTogether) {
      const int64_t columns = std::min(kTogether, end - first);
      double total[kTogether] = {};
      for (int64_t block = 0; block < workspace_.blocks; ++block) {
        const T* row = partial_ + block * p_.columns + first;
        for (int64_t j = 0; j < columns; ++j) total[j] += static_cast<double>(row[j]);
      }
      for (int64_t j = 0; j < columns; ++j) {
        average_out_[first + j] = static_cast<T>(total[j] / number);
      }
    }
  }

  ClassRow<T> row_of(int64_t c, int64_t start) const {
    const char* weight = pointer<const char>(p_.weight) +
                         (c * p_.weight_stride + start) * element_bytes(p_.weight_dtype);
    return {sums_ + c * p_.columns + start, centre_ + start, weight, per_count(c)};
  }

  void multiply(const Tile& tile, int64_t) {
    for (int64_t c = tile.first; c < tile.last; ++c) {
      Products& result = products_[tile.slice * p_.classes + c];
      result = seen(c)
                   ? loops_.weight[p_.weight_dtype].products(row_of(c, tile.start), tile.columns)
                   : Products{};
    }
  }

  Products whole_products(int64_t c) const {
    Products whole{};
    for (int64_t slice = 0; slice < workspace_.slices; ++slice) {
      const Products& part = products_[slice * p_.classes + c];
      whole.both += part.both;
      whole.weight += part.weight;
      whole.mean += part.mean;
    }
    return whole;
  }

  // The largest squared length of a centred mean that is only rounding.
  double smallest_square() const {
    double square = 0;
    for (int64_t j = 0; j < p_.columns; ++j) {
      square += static_cast<double>(centre_[j]) * static_cast<double>(centre_[j]);
    }
    const double share = kCentredRounding * static_cast<double>(std::numeric_limits<T>::epsilon());
    return share * share * square;
  }

  static bool defined(const Products& whole, double smallest) {
    // NaN has no direction either, but must reach the loss.
    if (std::isnan(whole.weight + whole.mean)) return true;
    return whole.weight > 0 && whole.mean > smallest;
  }

  // The loss and the three factors of every class, from the products.
  void finish() {
    T* loss = pointer<T>(p_.loss);
    *loss = T(0);
    std::fill(factors_, factors_ + 3 * p_.classes, T(0));
    if (num_seen_ < 2) return;

    // Cosines overwrite the first slice's products.
    const double smallest = smallest_square();
    const double number = static_cast<double>(num_seen_);
    double mean = 0;
    for (int64_t c = 0; c < p_.classes; ++c) {
      const Products whole = whole_products(c);
      const bool is_defined = seen(c) && defined(whole, smallest);
      const double lengths = std::sqrt(whole.weight) * std::sqrt(whole.mean);
      Products& kept = products_[c];
      kept = {is_defined ? whole.both / lengths : 0, is_defined ? whole.weight : kNoCosine,
              whole.mean};
      if (seen(c)) mean += kept.both;
    }
    mean /= number;
    double squares = 0;
    for (int64_t c = 0; c < p_.classes; ++c) {
      const double deviation = products_[c].both - mean;
      if (seen(c)) squares += deviation * deviation;
    }
    const double spread = std::sqrt(squares / (number - 1));
    const double size = std::sqrt(mean * mean + kCvEpsilon * kCvEpsilon);
    const auto statistic = static_cast<CollapseStatistic>(p_.statistic);
    *loss = static_cast<T>(statistic == CollapseStatistic::kMean ? 1 - mean
                           : statistic == CollapseStatistic::kCv ? spread / size
                                                                 : spread);
    for (int64_t c = 0; c < p_.classes; ++c) {
      const double cosine = products_[c].both, weight = products_[c].weight;
      if (weight == kNoCosine) continue;
      double slope = -1 / number;
      if (statistic != CollapseStatistic::kMean) {
        slope = spread == 0 ? 0 : (cosine - mean) / ((number - 1) * spread);
      }
      if (statistic == CollapseStatistic::kCv) {
        slope = slope / size - spread * mean / (size * size * size * number);
      }
      const double length = products_[c].mean;
      factors_[c] = static_cast<T>(slope / (std::sqrt(weight) * std::sqrt(length)));
      factors_[p_.classes + c] = static_cast<T>(slope * cosine / weight);
      factors_[2 * p_.classes + c] = static_cast<T>(slope * cosine / length);
    }
  }

  T factor(int64_t which, int64_t c) const { return grad_loss_ * factors_[which * p_.classes + c]; }

  void weight_gradients(const Tile& tile, int64_t) {
    const auto& weight = loops_.weight[p_.weight_dtype];
    const int64_t bytes = element_bytes(p_.weight_dtype);
    T* total = partial_ + tile.block * p_.columns + tile.start;
    if (p_.grad_features != 0) std::fill(total, total + tile.columns, T(0));
    for (int64_t c = tile.first; c < tile.last; ++c) {
      // The weight's row of a class not seen is not read, as in the forward.
      if (p_.grad_weight != 0) {
        char* out = pointer<char>(p_.grad_weight) + (c * p_.columns + tile.start) * bytes;
        if (seen(c)) {
          weight.weight_gradient(out, row_of(c, tile.start), factor(0, c), factor(1, c),
                                 tile.columns);
        } else {
          std::memset(out, 0, static_cast<size_t>(tile.columns * bytes));
        }
      }
      if (p_.grad_features != 0 && seen(c)) {
        weight.add_mean_gradient(total, row_of(c, tile.start), factor(0, c), factor(2, c),
                                 tile.columns);
      }
    }
  }

  char* feature_gradient(int64_t t, int64_t start) const {
    return pointer<char>(p_.grad_features) +
           (t * p_.columns + start) * element_bytes(p_.features_dtype);
  }

  void row_gradients(const Tile& tile, int64_t worker) {
    const size_t bytes = static_cast<size_t>(tile.columns * element_bytes(p_.features_dtype));
    T* wide = scratch(worker, 0);
    T* rounded = scratch(worker, 1);
    for (int64_t c = tile.first; c < tile.last; ++c) {
      if (rows_of(c) == 0) continue;
      loops_.weight[p_.weight_dtype].row_gradient(wide, row_of(c, tile.start),
                                                  average_ + tile.start, factor(0, c), factor(2, c),
                                                  tile.columns);
      loops_.features[p_.features_dtype].round_row(rounded, wide, tile.columns);
      for (int64_t i = starts_[c]; i < starts_[c + 1]; ++i) {
        std::memcpy(feature_gradient(order_[i], tile.start), rounded, bytes);
      }
    }
  }

  void clear_unlabelled(int64_t item, int64_t) {
    const size_t bytes = static_cast<size_t>(p_.columns * element_bytes(p_.features_dtype));
    const int64_t first = starts_[p_.classes] + item * kRowsPerFill;
    const int64_t last = std::min(first + kRowsPerFill, starts_[p_.classes + 1]);
    for (int64_t i = first; i < last; ++i) std::memset(feature_gradient(order_[i], 0), 0, bytes);
  }

  const CollapseParams& p_;
  Workspace workspace_;
  CollapseLoops<T> loops_;
  int64_t* starts_;
  int64_t* order_;
  T* partial_;
  T* average_;
  Products* products_;
  T* scratch_;
  T* sums_;
  double* counts_;
  T* centre_;
  T* factors_;
  T* average_out_ = nullptr;
  double decay_ = 0;
  T grad_loss_ = 0;
  int64_t num_seen_ = 0;
};

template <class T>
bool takes(const CollapseParams& p) {
  const auto loops = loops_of<T>(p.level);
  return loops.features[p.features_dtype].sum_rows != nullptr &&
         loops.weight[p.weight_dtype].products != nullptr;
}

Status check(const CollapseParams& p) {
  if (p.level < 0 || p.level > static_cast<int64_t>(best_cpu_level())) {
    return Status::kUnsupportedLevel;
  }
  if (element_bytes(p.features_dtype) == 0 || element_bytes(p.weight_dtype) == 0) {
    return Status::kUnknownDType;
  }
  const auto sums = static_cast<DType>(p.sums_dtype);
  const bool fits = sums == DType::kFloat32   ? takes<float>(p)
                    : sums == DType::kFloat64 ? takes<double>(p)
                                              : false;
  return fits ? Status::kOk : Status::kUnknownDType;
}

}  // namespace

int64_t collapse_workspace_bytes(const CollapseParams& p) { return workspace_of(p).bytes; }

Status collapse_alignment_cpu(const CollapseParams& p) {
  const Status status = check(p);
  if (status != Status::kOk) return status;
  return static_cast<DType>(p.sums_dtype) == DType::kFloat64 ? Collapse<double>(p).forward()
                                                             : Collapse<float>(p).forward();
}

Status collapse_alignment_backward_cpu(const CollapseParams& p) {
  const Status status = check(p);
  if (status != Status::kOk) return status;
  return static_cast<DType>(p.sums_dtype) == DType::kFloat64 ? Collapse<double>(p).backward()
                                                             : Collapse<float>(p).backward();
}

}  // namespace fastdean
