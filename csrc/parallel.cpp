#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#ifdef __unix__
#include <dlfcn.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastdean {
namespace {

struct Team {
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next;
  int64_t num_workers;
};

void take_all(void* data) {
  auto* team = static_cast<Team*>(data);
  for (int64_t worker; (worker = team->next.fetch_add(1)) < team->num_workers;) {
    team->body(team->context, worker);
  }
}

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Phases {
  const Phase* phases;
  int64_t num_phases;
  void* context;
  std::atomic<int64_t> next[kMaxPhases];
  std::atomic<int64_t> done[kMaxPhases];
};

// A running worker has taken every item that is not done, so nobody waits for ever, however few
// workers run at the same time.
void wait_for(const std::atomic<int64_t>& done, int64_t items) {
  constexpr int kLooks = 4096;
  for (int looks = 0; done.load(std::memory_order_acquire) < items; ++looks) {
    // The worker with the last item may need this core.
    if (looks >= kLooks) std::this_thread::yield();
  }
}

void take_phases(void* data, int64_t worker) {
  auto* all = static_cast<Phases*>(data);
  for (int64_t i = 0; i < all->num_phases; ++i) {
    const Phase& phase = all->phases[i];
    for (int64_t item; (item = all->next[i].fetch_add(1)) < phase.items;) {
      phase.step(all->context, item, worker);
      all->done[i].fetch_add(1, std::memory_order_release);
    }
    wait_for(all->done[i], phase.items);
  }
}

// The OpenMP runtime that torch has loaded, if it is visible. Its idle threads spin for milliseconds
// after an operation of torch, and threads of our own would share the cores with them.
OpenMpParallel openmp_parallel() {
#ifdef __unix__
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void run_workers(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context) {
  Team team{body, context, {0}, num_workers};
  if (num_workers <= 1) {
    take_all(&team);
  } else if (const auto parallel = openmp_parallel()) {
    // May give fewer threads than asked for; these take all workers.
    parallel(take_all, &team, static_cast<unsigned>(num_workers), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < num_workers; ++i) others.emplace_back(take_all, &team);
    take_all(&team);
    for (auto& other : others) other.join();
  }
}

void run_phases(int64_t num_workers, const Phase* phases, int64_t num_phases, void* context) {
  Phases all{phases, num_phases, context, {}, {}};
  for (int64_t i = 0; i < num_phases; ++i) all.next[i] = all.done[i] = 0;
  run_workers(num_workers, take_phases, &all);
}

void advise_large_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  constexpr int64_t kLeastBytes = 8 << 20;
  if (bytes < kLeastBytes) return;
  // Whole pages inside the allocation only; its neighbours belong to others.
  const auto address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kLargePage * kLargePage;
  // A system may refuse, and uses small pages then.
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)start;
  (void)bytes;
#endif
}

}  // namespace fastdean
