#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#ifdef __unix__
#include <dlfcn.h>
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

// The OpenMP runtime that torch has loaded, if it is visible. Its idle threads go on spinning for
// milliseconds after an operation of torch, and threads of our own would have to share the cores
// with them.
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
    // May give fewer threads than asked for: those there are take the workers that are left.
    parallel(take_all, &team, static_cast<unsigned>(num_workers), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < num_workers; ++i) others.emplace_back(take_all, &team);
    take_all(&team);
    for (auto& other : others) other.join();
  }
}

}  // namespace fastdean
