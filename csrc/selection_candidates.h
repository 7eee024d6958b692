// The k most important entries seen so far, and what an entry must reach to become one of them.
//
// Not for files that are compiled for an instruction set of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastdean {

struct Candidate {
  float importance;  // positive and finite
  float sum;
  int64_t index;  // flat, row-major
};

// Higher importance first, ties by the lower index: the order that a selection takes entries in.
inline bool comes_before(const Candidate& a, const Candidate& b) {
  return a.importance > b.importance || (a.importance == b.importance && a.index < b.index);
}

// The lowest product, or one a little lower, whose quotient by `divisor` rounds to `importance` or
// more. Only what reaches it needs the division, which takes longer than all else.
inline float least_product(float importance, float divisor) {
  if (std::isinf(importance)) return importance;
  // What rounds to a number is at most half a last place below it. In double these steps lose far
  // less than the other half.
  const double half = std::max(importance * 0x1p-24, 0x1p-150);
  const double least = (importance - 2 * half) * divisor;
  if (!(least > 0)) return 0x1p-149f;
  if (least >= std::numeric_limits<float>::max()) return std::numeric_limits<float>::max();
  const auto rounded = static_cast<float>(least);
  return std::max(rounded > least ? std::nextafterf(rounded, 0.0f) : rounded, 0x1p-149f);
}

// Collects into memory of the caller. When it is full, all but the k first are dropped: a time in
// proportion to what came in since, whatever the order of the entries.
class TopCandidates {
 public:
  // `capacity`: as many as can come, or more than k.
  TopCandidates(Candidate* room, int64_t capacity, int64_t k)
      : room_(room), capacity_(capacity), k_(k) {}

  // The room that `entries` entries need.
  static int64_t capacity_for(int64_t k, int64_t entries) {
    constexpr int64_t kSpare = 1024;
    return k == 0 ? 0 : k >= entries / 2 - kSpare ? entries : 2 * k + kSpare;
  }

  void add(const Candidate& candidate) {
    if (k_ == 0 || !comes_before(candidate, last_)) return;
    room_[size_++] = candidate;
    if (size_ == capacity_) cut();
  }

  // Entries of lower importance are not taken; nor, once k are there, equal ones of a higher index.
  float least() const { return last_.importance; }
  bool takes_none() const { return k_ == 0; }

  int64_t size() const { return size_; }
  const Candidate* data() const { return room_; }

 private:
  void cut() {
    if (size_ <= k_) return;
    std::nth_element(room_, room_ + k_ - 1, room_ + size_, comes_before);
    size_ = k_;
    last_ = room_[k_ - 1];
  }

  Candidate* room_;
  int64_t capacity_;
  int64_t k_;
  int64_t size_ = 0;
  Candidate last_{0.0f, 0.0f, -1};
};

}  // namespace fastdean
