// The collapse-alignment loss and its backward against sums in double; compiled with the sanitizers,
// so that a read or write outside its memory, or undefined behaviour, ends it.
//
// Without an argument all cases are checked; "few" are each case in each dtype once, and "one" is a
// single case. "random SEED" are some of random sizes.
//
// What must not be read holds NaN: the gaps between rows, rows of features without a label, rows of
// the weight of classes not seen, and every output and workspace before the call; what is dropped
// or forgotten is infinite.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "entry_points.h"
#include "fastdean.h"

namespace {

using fastdean::CollapseParams;
using fastdean::CollapseStatistic;
using fastdean::CpuLevel;
using fastdean::DType;
using fastdean::Status;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

// How many bits of a half's 16 are its mantissa's.
int mantissa_bits(DType dtype) { return dtype == DType::kFloat16 ? 10 : 7; }

double half_of(uint16_t bits, int mantissa) {
  const int largest = (1 << (15 - mantissa)) - 1, bias = largest / 2;
  const int exponent = (bits >> mantissa) & largest, fraction = bits & ((1 << mantissa) - 1);
  double value = std::ldexp(fraction + (exponent == 0 ? 0 : 1 << mantissa),
                            std::max(exponent, 1) - bias - mantissa);
  if (exponent == largest) value = fraction == 0 ? kInfinity : kNaN;
  return bits >> 15 != 0 ? -value : value;
}

// To the nearest; what would be denormal becomes 0.
uint16_t to_half(double value, int mantissa) {
  const int bias = ((1 << (15 - mantissa)) - 1) / 2;
  if (std::isnan(value)) return 0xffff;
  if (std::fabs(value) < std::ldexp(1, 1 - bias)) return 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);
  // The mantissa's leading one raises the exponent, here as in what is stored.
  const auto digits = std::lrint(std::ldexp(fraction, mantissa + 1));
  const auto bits = ((exponent - 2 + bias) << mantissa) + digits;
  return static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

// `count` elements of a dtype, NaN at first, in exactly as many bytes as they need.
struct Elements {
  DType dtype;
  std::vector<char> bytes;

  Elements(DType dtype, int64_t count) : dtype(dtype), bytes(count * width(), char(0xff)) {}

  int64_t width() const { return fastdean::element_bytes(static_cast<int64_t>(dtype)); }
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / width(); }
  int64_t address() const { return reinterpret_cast<int64_t>(bytes.data()); }

  template <class Stored>
  Stored stored(int64_t i) const {
    Stored value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    return value;
  }

  template <class Stored>
  void store(int64_t i, Stored value) {
    std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
  }

  double get(int64_t i) const {
    if (dtype == DType::kFloat64) return stored<double>(i);
    if (dtype == DType::kFloat32) return stored<float>(i);
    return half_of(stored<uint16_t>(i), mantissa_bits(dtype));
  }

  void set(int64_t i, double value) {
    if (dtype == DType::kFloat64) return store(i, value);
    if (dtype == DType::kFloat32) return store(i, static_cast<float>(value));
    store(i, to_half(value, mantissa_bits(dtype)));
  }
};

struct DTypes {
  const char* name;
  DType features, weight, sums;
};

const DTypes kDTypes[] = {
    {"fp16", DType::kFloat16, DType::kFloat16, DType::kFloat32},
    {"bf16", DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
    {"fp32", DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {"fp16 with a weight in fp32", DType::kFloat16, DType::kFloat32, DType::kFloat32},
    {"fp64", DType::kFloat64, DType::kFloat64, DType::kFloat64},
};

enum class Features {
  kScattered,  // about a mean of each class
  kAlike,      // all rows are the same
  kOpposite,   // 1 for class 0 and -1 for class 1, both exactly along their weights
};

struct Case {
  const char* name;
  int64_t rows, columns, classes;
  int64_t gap;       // elements between a row of features or weight and the next
  int64_t labelled;  // labels are -1 or one of this many classes
  double decay;
  bool has_state;  // else the old sums and counts are 0
  Features kind;
};

const Case kCases[] = {
    {"1 column", 40, 1, 8, 0, 6, 1, true, Features::kScattered},
    {"7 columns", 40, 7, 8, 5, 6, 0.5, true, Features::kScattered},
    {"63 columns", 40, 63, 8, 0, 6, 0, true, Features::kScattered},
    {"65 columns", 40, 65, 8, 1, 6, 0.875, true, Features::kScattered},
    {"no row and no state", 0, 7, 3, 0, 1, 1, false, Features::kScattered},
    {"the state alone", 0, 1031, 8, 0, 6, 0.5, true, Features::kScattered},
    {"no label", 9, 7, 3, 2, 0, 1, false, Features::kScattered},
    {"one class seen", 9, 7, 3, 2, 1, 1, false, Features::kScattered},
    {"class means alike", 9, 7, 3, 2, 2, 1, false, Features::kAlike},
    {"cosines alike", 6, 1, 2, 0, 2, 1, false, Features::kOpposite},
};

// More of rows, columns and classes than a block of a kernel takes at once.
const Case kBlocks = {"several blocks", 300, 258, 7, 2, 5, 0.5, true, Features::kScattered};
// Rows and classes of which a block of a kernel takes one lot after the other.
const Case kManyRows = {"many rows", 16500, 2, 5, 1, 3, 0.5, true, Features::kScattered};
const Case kManyClasses = {"many classes", 90, 2, 2100, 0, 40, 0.5, true, Features::kScattered};

// Three blocks of classes in two slices of columns, two lots of rows without a label, and work for
// three threads.
const Case kManyTiles = {"many tiles", 900, 1031, 67, 3, 60, 0.5, true, Features::kScattered};
const Case kRefused = {"refused", 9, 7, 3, 0, 2, 1, false, Features::kScattered};

struct Problem {
  const Case& c;
  DTypes dtypes;
  std::vector<int64_t> labels;
  std::vector<double> old_counts, counts;
  Elements old_sums, features, weight, grad_loss;

  Problem(const Case& c, const DTypes& dtypes)
      : c(c),
        dtypes(dtypes),
        labels(c.rows),
        old_counts(c.classes, 0.0),
        counts(c.classes, 0.0),
        old_sums(dtypes.sums, c.classes * c.columns),
        features(dtypes.features, length(c.rows)),
        weight(dtypes.weight, length(c.classes)),
        grad_loss(dtypes.sums, 1) {
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    // About a third of the rows has no label.
    for (int64_t t = 0; t < c.rows; ++t) {
      const bool has = c.labelled > 0 && random() % 3 != 0;
      labels[t] = has ? static_cast<int64_t>(random()) % c.labelled : -1;
      if (c.kind == Features::kOpposite) labels[t] = t % 3 - 1;
    }
    set_counts();
    std::vector<double> direction(c.classes * c.columns);
    for (double& value : direction) value = normal(random);
    for (int64_t i = 0; i < c.classes * c.columns; ++i) {
      const bool lost = c.decay == 0 || (c.has_state && counts[i / c.columns] == 0);
      old_sums.set(i, lost ? kInfinity : old_counts[i / c.columns] * direction[i]);
    }
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t j = 0; j < c.columns; ++j) {
        if (labels[t] < 0) continue;
        double value = direction[labels[t] * c.columns + j] + normal(random);
        if (c.kind == Features::kAlike) value = std::cos(j + 1.0);
        if (c.kind == Features::kOpposite) value = labels[t] == 0 ? 1 : -1;
        features.set(t * stride() + j, value);
      }
    }
    // Of many classes, one has no weight; the others' lie along and against their means.
    for (int64_t k = 0; k < c.classes; ++k) {
      for (int64_t j = 0; j < c.columns; ++j) {
        if (counts[k] == 0) continue;
        const double along = static_cast<double>(k % 4) - 1;
        double value = direction[k * c.columns + j] * along + normal(random);
        if (k == 2 && c.classes > 3) value = 0;
        if (c.kind == Features::kOpposite) value = k == 0 ? 2 : -2;
        weight.set(k * stride() + j, value);
      }
    }
    grad_loss.set(0, -0.75);
  }

  int64_t stride() const { return c.columns + c.gap; }

 private:
  int64_t length(int64_t rows) const { return rows == 0 ? 0 : (rows - 1) * stride() + c.columns; }

  // Of the old state's classes the last but one is forgotten where there is a decay, and the last
  // has not been seen.
  void set_counts() {
    for (int64_t k = 0; c.has_state && k < c.classes; ++k) {
      old_counts[k] = k + 1 == c.classes ? 0 : k + 2 == c.classes ? 1e-7 : k % 2 * (1.5 + k);
      if (c.decay == 1 && k + 2 == c.classes) old_counts[k] = 3;
      if (c.decay == 0) old_counts[k] = kNaN;
      if (c.decay > 0) counts[k] = c.decay * old_counts[k];
      if (c.decay < 1 && counts[k] < std::ldexp(1, -20)) counts[k] = 0;
    }
    for (const int64_t label : labels) {
      if (label >= 0) counts[label] += 1;
    }
  }
};

// What is right, each with the size of what it is the difference of: rounding is relative to that.
struct Expected {
  std::vector<double> sums, sums_scale, centre, centre_scale, loss, loss_scale;
  std::vector<double> grad_weight, grad_weight_scale, grad_features, grad_features_scale;
};

double statistic_of(const std::vector<double>& cosines, CollapseStatistic statistic) {
  const auto number = static_cast<double>(cosines.size());
  double mean = 0, squares = 0;
  for (const double cosine : cosines) mean += cosine / number;
  for (const double cosine : cosines) squares += (cosine - mean) * (cosine - mean);
  const double spread = std::sqrt(squares / (number - 1));
  if (statistic == CollapseStatistic::kMean) return 1 - mean;
  return statistic == CollapseStatistic::kStd ? spread : spread / std::sqrt(mean * mean + 1e-6);
}

// Central differences: 0 at the kink of the standard deviation, as the loss has it.
double slope_of(std::vector<double> cosines, size_t i, CollapseStatistic statistic) {
  constexpr double kStep = 1e-5;
  cosines[i] += kStep;
  const double above = statistic_of(cosines, statistic);
  cosines[i] -= 2 * kStep;
  return (above - statistic_of(cosines, statistic)) / (2 * kStep);
}

double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64   ? std::ldexp(1, -52)
         : dtype == DType::kFloat32 ? std::ldexp(1, -23)
                                    : std::ldexp(1, -mantissa_bits(dtype));
}

// The formulas of the loss and of its gradients in double, class by class.
class Oracle {
 public:
  Oracle(const Problem& problem, CollapseStatistic statistic)
      : p_(problem), c_(problem.c), statistic_(statistic), e_() {
    add_sums();
    centre();
    align();
    differentiate();
  }

  const Expected& expected() const { return e_; }

 private:
  void add_sums() {
    const int64_t numel = c_.classes * c_.columns;
    e_.sums.assign(numel, 0);
    e_.sums_scale.assign(numel, 0);
    const auto add = [&](int64_t at, double value) {
      e_.sums[at] += value;
      e_.sums_scale[at] += std::fabs(value);
    };
    for (int64_t i = 0; i < numel; ++i) {
      if (c_.decay > 0 && p_.counts[i / c_.columns] > 0) add(i, c_.decay * p_.old_sums.get(i));
    }
    for (int64_t t = 0; t < c_.rows; ++t) {
      for (int64_t j = 0; p_.labels[t] >= 0 && j < c_.columns; ++j) {
        add(p_.labels[t] * c_.columns + j, p_.features.get(t * p_.stride() + j));
      }
    }
  }

  void centre() {
    for (int64_t k = 0; k < c_.classes; ++k) {
      if (p_.counts[k] > 0) seen_.push_back(k);
    }
    e_.centre.assign(c_.columns, 0);
    e_.centre_scale.assign(c_.columns, 0);
    for (const int64_t k : seen_) {
      for (int64_t j = 0; j < c_.columns; ++j) {
        const double share = p_.counts[k] * static_cast<double>(seen_.size());
        e_.centre[j] += e_.sums[k * c_.columns + j] / share;
        e_.centre_scale[j] += e_.sums_scale[k * c_.columns + j] / share;
      }
    }
  }

  double mean(int64_t k, int64_t j) const {
    return e_.sums[k * c_.columns + j] / p_.counts[k] - e_.centre[j];
  }
  double weight(int64_t k, int64_t j) const { return p_.weight.get(k * p_.stride() + j); }

  void align() {
    double centre = 0;
    for (const double value : e_.centre) centre += value * value;
    for (const int64_t k : seen_) {
      double both = 0, weights = 0, means = 0;
      for (int64_t j = 0; j < c_.columns; ++j) {
        both += weight(k, j) * mean(k, j);
        weights += weight(k, j) * weight(k, j);
        means += mean(k, j) * mean(k, j);
      }
      weight_length_.push_back(std::sqrt(weights));
      mean_length_.push_back(std::sqrt(means));
      const double rounding = 8 * epsilon_of(p_.dtypes.sums) * std::sqrt(centre);
      defined_.push_back(weights > 0 && mean_length_.back() > rounding);
      cosines_.push_back(defined_.back() ? both / std::sqrt(weights * means) : 0);
    }
  }

  void differentiate() {
    std::vector<double> slopes(seen_.size(), 0);
    double steepest = 0;
    const bool enough = seen_.size() >= 2;
    for (size_t i = 0; enough && i < seen_.size(); ++i) {
      slopes[i] = slope_of(cosines_, i, statistic_);
      steepest = std::max(steepest, std::fabs(slopes[i]));
    }
    e_.loss = {enough ? statistic_of(cosines_, statistic_) : 0};
    e_.loss_scale = {enough ? 1 + steepest * static_cast<double>(seen_.size()) : 0};
    e_.grad_weight.assign(c_.classes * c_.columns, 0);
    e_.grad_weight_scale = e_.grad_weight;
    e_.grad_features.assign(c_.rows * c_.columns, 0);
    e_.grad_features_scale = e_.grad_features;
    std::vector<double> by_mean(c_.classes * c_.columns, 0), common(c_.columns, 0);
    double shortest = kInfinity;
    for (size_t i = 0; enough && i < seen_.size(); ++i) {
      if (!defined_[i]) continue;
      const double lengths = weight_length_[i] * mean_length_[i];
      const double weights = weight_length_[i] * weight_length_[i];
      const double means = mean_length_[i] * mean_length_[i];
      shortest = std::min(shortest, mean_length_[i]);
      for (int64_t j = 0; j < c_.columns; ++j) {
        const int64_t at = seen_[i] * c_.columns + j;
        const double w = weight(seen_[i], j), m = mean(seen_[i], j), slope = upstream() * slopes[i];
        e_.grad_weight[at] = slope * (m / lengths - cosines_[i] * w / weights);
        e_.grad_weight_scale[at] = std::fabs(upstream()) * steepest / weight_length_[i];
        by_mean[at] = slope * (w / lengths - cosines_[i] * m / means);
        common[j] += by_mean[at] / static_cast<double>(seen_.size());
      }
    }
    for (int64_t t = 0; t < c_.rows; ++t) {
      const int64_t k = p_.labels[t];
      for (int64_t j = 0; k >= 0 && j < c_.columns; ++j) {
        const int64_t at = t * c_.columns + j;
        e_.grad_features[at] = (by_mean[k * c_.columns + j] - common[j]) / p_.counts[k];
        e_.grad_features_scale[at] = std::fabs(upstream()) * steepest / (shortest * p_.counts[k]);
      }
    }
  }

  double upstream() const { return p_.grad_loss.get(0); }

  const Problem& p_;
  const Case& c_;
  CollapseStatistic statistic_;
  Expected e_;
  // One for each class seen.
  std::vector<int64_t> seen_;
  std::vector<double> weight_length_, mean_length_, cosines_;
  std::vector<bool> defined_;
};

struct Results {
  Elements sums, counts, centre, factors, loss, grad_weight, grad_features;

  explicit Results(const Problem& p)
      : sums(p.dtypes.sums, p.c.classes * p.c.columns),
        counts(DType::kFloat64, p.c.classes),
        centre(p.dtypes.sums, p.c.columns),
        factors(p.dtypes.sums, 3 * p.c.classes),
        loss(p.dtypes.sums, 1),
        grad_weight(p.dtypes.weight, p.c.classes * p.c.columns),
        grad_features(p.dtypes.features, p.c.rows * p.c.columns) {}

  bool operator==(const Results& other) const {
    return sums.bytes == other.sums.bytes && counts.bytes == other.counts.bytes &&
           centre.bytes == other.centre.bytes && factors.bytes == other.factors.bytes &&
           loss.bytes == other.loss.bytes && grad_weight.bytes == other.grad_weight.bytes &&
           grad_features.bytes == other.grad_features.bytes;
  }
};

template <class T>
int64_t address_of(const std::vector<T>& values) {
  return reinterpret_cast<int64_t>(values.data());
}

// The fields of both directions.
CollapseParams params_of(const Problem& p, const Results& results, int64_t level, int64_t workers) {
  CollapseParams params{};
  params.features_dtype = static_cast<int64_t>(p.dtypes.features);
  params.labels = address_of(p.labels);
  params.weight = p.weight.address();
  params.weight_stride = p.stride();
  params.weight_dtype = static_cast<int64_t>(p.dtypes.weight);
  params.sums = results.sums.address();
  params.counts = results.counts.address();
  params.centre = results.centre.address();
  params.factors = results.factors.address();
  params.sums_dtype = static_cast<int64_t>(p.dtypes.sums);
  params.rows = p.c.rows;
  params.columns = p.c.columns;
  params.classes = p.c.classes;
  params.level = level;
  params.num_workers = workers;
  return params;
}

template <class Call>
Status in_a_workspace(CollapseParams params, Call call) {
  // NaN in either dtype of the sums, and as integers no two alike.
  std::vector<int64_t> workspace(entry_points::collapse_workspace_bytes(params) / 8);
  std::iota(workspace.begin(), workspace.end(), -(int64_t{1} << 20));
  params.workspace = address_of(workspace);
  return call(params);
}

CollapseParams forward_params(const Problem& p, const Results& results, CollapseStatistic statistic,
                              int64_t level, int64_t workers) {
  CollapseParams params = params_of(p, results, level, workers);
  params.features = p.features.address();
  params.features_stride = p.stride();
  params.old_sums = p.old_sums.address();
  params.old_counts = address_of(p.old_counts);
  params.decay = reinterpret_cast<int64_t>(&p.c.decay);
  params.statistic = static_cast<int64_t>(statistic);
  params.loss = results.loss.address();
  return params;
}

CollapseParams backward_params(const Problem& p, const Results& results, int64_t level,
                               int64_t workers) {
  CollapseParams params = params_of(p, results, level, workers);
  params.grad_loss = p.grad_loss.address();
  params.grad_weight = results.grad_weight.address();
  params.grad_features = results.grad_features.address();
  return params;
}

bool untouched(const Elements& elements) {
  return std::all_of(elements.bytes.begin(), elements.bytes.end(),
                     [](char byte) { return byte == char(0xff); });
}

Results run(const Problem& p, CollapseStatistic statistic, int64_t level, int64_t workers,
            const std::string& where) {
  Results results(p);
  const CollapseParams forward = forward_params(p, results, statistic, level, workers);
  const CollapseParams backward = backward_params(p, results, level, workers);
  expect(in_a_workspace(forward, entry_points::collapse_alignment) == Status::kOk,
         where + ": the forward refused");
  expect(in_a_workspace(backward, entry_points::collapse_alignment_backward) == Status::kOk,
         where + ": the backward refused");
  return results;
}

// The backward for one gradient at a time must find what that for both did.
void check_alone(const Problem& p, const Results& results, int64_t level,
                 const std::string& where) {
  Results alone(p);
  CollapseParams one = backward_params(p, results, level, 1);
  one.grad_weight = alone.grad_weight.address();
  one.grad_features = 0;
  in_a_workspace(one, entry_points::collapse_alignment_backward);
  expect(alone.grad_weight.bytes == results.grad_weight.bytes,
         where + ": another grad_weight without grad_features");
  one.grad_weight = 0;
  one.grad_features = alone.grad_features.address();
  in_a_workspace(one, entry_points::collapse_alignment_backward);
  expect(alone.grad_features.bytes == results.grad_features.bytes,
         where + ": another grad_features without grad_weight");
}

// Within `tolerance` times the scale, and half the last place of what was found.
void expect_close(const Elements& found, const std::vector<double>& right,
                  const std::vector<double>& scale, double tolerance, const std::string& what) {
  for (int64_t i = 0; i < found.count(); ++i) {
    // Half of fp16's last place where it is denormal; of no account to the others.
    const double least = found.dtype == DType::kFloat16 ? std::ldexp(1, -25) : 0;
    const double rounding = std::fabs(right[i]) * epsilon_of(found.dtype) / 2 + least;
    if (std::fabs(found.get(i) - right[i]) <= tolerance * scale[i] + rounding) continue;
    char numbers[120];
    std::snprintf(numbers, sizeof numbers, "[%lld] is %.9g, not %.9g within %.2g",
                  static_cast<long long>(i), found.get(i), right[i],
                  tolerance * scale[i] + rounding);
    return expect(false, what + numbers);
  }
}

void check_results(const Problem& p, const Results& found, const Expected& right,
                   const std::string& where) {
  const bool wide = p.dtypes.sums == DType::kFloat64;
  const double direct = 8 * epsilon_of(p.dtypes.sums);
  // The slopes of the oracle are differences, good to 1e-9 or so.
  const double indirect = wide ? 1e-8 : 2e-5;
  expect_close(found.sums, right.sums, right.sums_scale, direct, where + ": sums");
  expect_close(found.counts, p.counts, p.counts, 1e-15, where + ": counts");
  expect_close(found.centre, right.centre, right.centre_scale, direct, where + ": centre");
  expect_close(found.loss, right.loss, right.loss_scale, wide ? 1e-13 : indirect, where + ": loss");
  expect_close(found.grad_weight, right.grad_weight, right.grad_weight_scale, indirect,
               where + ": grad_weight");
  expect_close(found.grad_features, right.grad_features, right.grad_features_scale, indirect,
               where + ": grad_features");
}

const char* name_of(CollapseStatistic statistic) {
  return statistic == CollapseStatistic::kStd  ? "std"
         : statistic == CollapseStatistic::kCv ? "cv"
                                               : "mean";
}

void check(const Problem& p, CollapseStatistic statistic,
           const std::vector<int64_t>& more_workers = {2, 3}) {
  const Oracle oracle(p, statistic);
  const auto best = static_cast<int64_t>(std::min(entry_points::best_level(), CpuLevel::kAvx2));
  for (int64_t level = 0; level <= best; ++level) {
    const std::string where = std::string(p.c.name) + ", " + p.dtypes.name + ", " +
                              name_of(statistic) + ", level " + std::to_string(level);
    const Results first = run(p, statistic, level, 1, where);
    check_results(p, first, oracle.expected(), where);
    check_alone(p, first, level, where);
    for (const int64_t workers : more_workers) {
      const std::string by = where + ", " + std::to_string(workers) + " workers";
      expect(run(p, statistic, level, workers, by) == first, by + ": other bits than by 1");
    }
  }
}

void check_refused(const Problem& p, int64_t CollapseParams::* field, int64_t value, Status right,
                   const std::string& what) {
  const Results results(p);
  CollapseParams params = forward_params(p, results, CollapseStatistic::kStd, 0, 1);
  params.*field = value;
  expect(in_a_workspace(params, entry_points::collapse_alignment) == right, what + ": forward");
  params = backward_params(p, results, 0, 1);
  params.*field = value;
  expect(in_a_workspace(params, entry_points::collapse_alignment_backward) == right,
         what + ": backward");
  for (const Elements* each : {&results.sums, &results.counts, &results.centre, &results.factors,
                               &results.loss, &results.grad_weight, &results.grad_features}) {
    expect(untouched(*each), what + ": wrote");
  }
}

void check_refusals() {
  const Problem half(kRefused, kDTypes[0]);
  const auto unknown = Status::kUnknownDType;
  check_refused(half, &CollapseParams::features_dtype, 4, unknown, "features of dtype 4");
  check_refused(half, &CollapseParams::features_dtype, -1, unknown, "features of dtype -1");
  check_refused(half, &CollapseParams::weight_dtype, 4, unknown, "a weight of dtype 4");
  const auto fp64 = static_cast<int64_t>(DType::kFloat64);
  check_refused(half, &CollapseParams::features_dtype, fp64, unknown, "fp64 summed in fp32");
  check_refused(half, &CollapseParams::weight_dtype, fp64, unknown, "a weight in fp64 alone");
  check_refused(half, &CollapseParams::sums_dtype, fp64, unknown, "fp16 summed in fp64");
  const auto fp16 = static_cast<int64_t>(DType::kFloat16);
  check_refused(half, &CollapseParams::sums_dtype, fp16, unknown, "sums in fp16");
  const Problem wide(kRefused, kDTypes[4]);
  check_refused(wide, &CollapseParams::features_dtype, fp16, unknown, "fp16 with a weight in fp64");
  check_refused(wide, &CollapseParams::weight_dtype, fp16, unknown, "fp64 with a weight in fp16");
  const auto beyond = static_cast<int64_t>(entry_points::best_level()) + 1;
  for (const int64_t level : {int64_t{-1}, beyond}) {
    check_refused(half, &CollapseParams::level, level, Status::kUnsupportedLevel,
                  "level " + std::to_string(level));
  }
  for (const int64_t label : {-2, 3}) {
    std::vector<int64_t> labels = half.labels;
    labels.back() = label;
    check_refused(half, &CollapseParams::labels, address_of(labels), Status::kIndexOutOfRange,
                  "label " + std::to_string(label));
  }
}

// The kernels cannot refuse a label: it counts as none, and shows in the loss.
void check_labels_out_of_range() {
  Problem p(kBlocks, kDTypes[2]);
  const Results right = run(p, CollapseStatistic::kStd, 0, 1, "labels in range");
  // Of every block of rows more than one; the next one after the last class among them.
  for (int64_t t = 0; t < p.c.rows; ++t) {
    const int64_t beyond = p.c.classes + (t % 4 == 1 ? 0 : t << 32);
    if (p.labels[t] < 0) p.labels[t] = t % 2 == 0 ? -2 - t : beyond;
  }
  const Results found = run(p, CollapseStatistic::kStd, 0, 1, "labels out of range");
  expect(found.sums.bytes == right.sums.bytes, "labels out of range: other sums");
  expect(found.counts.bytes == right.counts.bytes, "labels out of range: other counts");
  expect(std::isnan(found.loss.get(0)), "labels out of range: a loss");
  for (const Elements* each : {&found.factors, &found.grad_weight, &found.grad_features}) {
    bool zero = true;
    for (int64_t i = 0; i < each->count(); ++i) zero &= each->get(i) == 0;
    expect(zero, "labels out of range: a gradient");
  }
}

Case random_case(std::mt19937& random) {
  const auto one_of = [&](std::initializer_list<int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  Case c = {"random", 0, 0, 0, 0, 0, 1, true, Features::kScattered};
  c.rows = one_of({0, 1, 2, 31, 255, 256, 257, 511, 700, 1025});
  c.columns = one_of({2, 3, 31, 32, 33, 63, 65, 255, 256, 257, 513});
  c.classes = one_of({3, 5, 31, 32, 33, 65, 257});
  c.gap = one_of({0, 1, 5});
  c.labelled = one_of({0, 1, c.classes / 2, c.classes - 2});
  c.decay = std::vector<double>{1, 0.875, 0.5, 0}[random() % 4];
  c.has_state = random() % 3 != 0;
  return c;
}

constexpr CollapseStatistic kStatistics[] = {CollapseStatistic::kStd, CollapseStatistic::kCv,
                                             CollapseStatistic::kMean};

void check_random(unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < 20; ++i) {
    const Case c = random_case(random);
    const DTypes& dtypes = kDTypes[random() % std::size(kDTypes)];
    check(Problem(c, dtypes), kStatistics[random() % 3], {2});
  }
}

void check_few() {
  // Kernels know no workers.
  const std::vector<int64_t> more_workers(entry_points::kOnCuda ? 0 : 1, 3);
  size_t next = 0;
  for (const DTypes& dtypes : kDTypes) {
    for (const Case& c : kCases) check(Problem(c, dtypes), kStatistics[next++ % 3], more_workers);
  }
  if (!entry_points::kOnCuda) {
    check(Problem(kManyTiles, kDTypes[1]), CollapseStatistic::kCv, more_workers);
    check(Problem(kManyClasses, kDTypes[2]), CollapseStatistic::kMean, more_workers);
  }
  check(Problem(kBlocks, kDTypes[1]), CollapseStatistic::kCv, {2});
  check(Problem(kManyRows, kDTypes[4]), CollapseStatistic::kStd, {});
}

void check_all() {
  for (const DTypes& dtypes : kDTypes) {
    for (const Case& c : kCases) {
      const Problem problem(c, dtypes);
      for (const CollapseStatistic statistic : kStatistics) check(problem, statistic);
    }
  }
  // In bf16, mixed and in fp64: what differs between dtypes has been seen above.
  for (const int i : {1, 3, 4}) check(Problem(kManyTiles, kDTypes[i]), CollapseStatistic::kCv);
  check(Problem(kBlocks, kDTypes[2]), CollapseStatistic::kCv);
  check(Problem(kManyClasses, kDTypes[2]), CollapseStatistic::kCv);
  // In fp64: so many rows round further in fp32 than the others.
  check(Problem(kManyRows, kDTypes[4]), CollapseStatistic::kCv);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "all";
  if (which == "all") check_all();
  if (which == "few") check_few();
  if (which == "one") check(Problem(kBlocks, kDTypes[2]), CollapseStatistic::kCv, {});
  if (which == "random") check_random(std::atoi(arguments[2]));
  if (entry_points::kOnCuda) {
    check_labels_out_of_range();
  } else {
    check_refusals();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
