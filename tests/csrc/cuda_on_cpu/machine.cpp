// The machine: fibres, blocks, barriers and exchanges between lanes.
#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fibres.h"
#include "floats.h"

// AddressSanitizer follows stacks if it is told of them; it is linked into one of the builds only.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** stack,
                                                           size_t*);
}

// Saves the registers that a call keeps and the stack's top, and goes on with those of another.
extern "C" void fastdean_switch(void** save, void* to);
asm(R"(
.text
.globl fastdean_switch
.hidden fastdean_switch
.type fastdean_switch, @function
fastdean_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulated {
namespace {

constexpr int kKeptRegisters = 6;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
// Tops of stacks a power of two apart would all lie in the same few lines of the cache.
constexpr size_t kStackStride = kStackBytes + 5 * 64;
constexpr int kFoundStatus = 3;

enum class State { kNew, kReady, kAtBarrier, kAtExchange, kDone };

struct Fibre {
  State state = State::kNew;
  unsigned thread = 0;
  Size index;
  uint32_t epoch = 0;
  int line = 0;  // of the source, where it waits
  unsigned mask = 0, source = 0;
  uint64_t bits = 0;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The launch that runs.
Config config{Size(), Size(), 0, nullptr};
const char* name = "";
void (*body)(const void*);
const void* kernel;
size_t kernel_bytes;
uint32_t launch_number = 0, block_number = 0;
Size block;
bool refused = false;

char* stacks;
std::vector<Fibre> fibres;
std::vector<unsigned> ready;
Fibre* current = nullptr;
void* host_stack_pointer;
void* host_fake_stack;
const void* host_stack;
size_t host_stack_bytes;

int number_from(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

const int mutant = number_from("FASTDEAN_MUTANT", -1);
uint64_t random_state = 0x9e3779b97f4a7c15u * (2 * number_from("FASTDEAN_SEED", 0) + 1);

[[noreturn]] void end() {
  std::fflush(nullptr);
  _exit(kFoundStatus);
}

struct Findings {
  std::set<std::string> seen;
  // Whatever the program itself thinks of its results.
  ~Findings() {
    if (!seen.empty()) end();
  }
} findings;

[[noreturn]] void give_up(const std::string& what) {
  report(what);
  end();
}

char* stack_of(const Fibre& fibre) { return stacks + fibre.thread * kStackStride; }

Size index_in(unsigned number, const Size& size) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

void enter_host() {
  Fibre& fibre = *current;
  if (__sanitizer_start_switch_fiber != nullptr) {
    void** const kept = fibre.state == State::kDone ? nullptr : &fibre.fake_stack;
    __sanitizer_start_switch_fiber(kept, host_stack, host_stack_bytes);
  }
  fastdean_switch(&fibre.stack_pointer, host_stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fibre.fake_stack, &host_stack, &host_stack_bytes);
  }
}

void start_fibre() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  }
  body(kernel);
  current->state = State::kDone;
  enter_host();
  std::abort();
}

void enter(Fibre& fibre) {
  current = &fibre;
  if (fibre.state == State::kNew) {
    fibre.state = State::kReady;
    auto** top = reinterpret_cast<void**>(stack_of(fibre) + kStackBytes);
    *--top = nullptr;  // where start_fibre would return to; it does not, and is aligned by this
    *--top = reinterpret_cast<void*>(&start_fibre);
    for (int i = 0; i < kKeptRegisters; ++i) *--top = nullptr;
    fibre.stack_pointer = top;
  }
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&host_fake_stack, stack_of(fibre), kStackBytes);
  }
  fastdean_switch(&host_stack_pointer, fibre.stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
  }
  current = nullptr;
}

// Until every thread waits or has returned.
void run_ready() {
  while (!ready.empty()) {
    std::swap(ready[random_below(ready.size())], ready.back());
    Fibre& fibre = fibres[ready.back()];
    ready.pop_back();
    enter(fibre);
    if (fibre.state == State::kReady) ready.push_back(fibre.thread);
  }
}

void release(Fibre& fibre) {
  fibre.state = State::kReady;
  ready.push_back(fibre.thread);
}

// Lets the lanes go on that `first` waits for and that wait as it does.
void exchange(const Fibre& first) {
  const unsigned warp = first.thread / kWarp * kWarp, mask = first.mask;
  unsigned lanes[kWarp], count = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (warp + lane >= fibres.size() || fibres[warp + lane].state == State::kDone) {
      give_up("an exchange waits for a lane that is not there");
    }
    const Fibre& other = fibres[warp + lane];
    if (other.state != State::kAtExchange || other.mask != mask || other.line != first.line) return;
    lanes[count++] = lane;
  }
  uint64_t sent[kWarp] = {};
  for (unsigned i = 0; i < count; ++i) sent[lanes[i]] = fibres[warp + lanes[i]].bits;
  for (unsigned i = 0; i < count; ++i) {
    Fibre& fibre = fibres[warp + lanes[i]];
    if ((mask >> fibre.source & 1) == 0) report("an exchange reads a lane outside of its mask");
    fibre.bits = sent[fibre.source];
    release(fibre);
  }
}

void pass_barrier() {
  int line = 0;
  unsigned waiting = 0, done = 0;
  for (const Fibre& fibre : fibres) {
    done += fibre.state == State::kDone;
    if (fibre.state != State::kAtBarrier) continue;
    if (waiting++ > 0 && fibre.line != line) report("threads of a block wait at two barriers");
    line = fibre.line;
  }
  if (waiting + done < fibres.size()) give_up("deadlock: some threads wait for others' lanes");
  if (done > 0) report("a barrier that not all threads of the block reach");
  for (Fibre& fibre : fibres) {
    if (fibre.state != State::kAtBarrier) continue;
    ++fibre.epoch;
    release(fibre);
  }
}

void run_block(unsigned threads) {
  fibres.assign(threads, Fibre());
  ready.clear();
  for (unsigned thread = 0; thread < threads; ++thread) {
    fibres[thread].thread = thread;
    fibres[thread].index = index_in(thread, config.block);
    ready.push_back(thread);
  }
  const auto is_done = [](const Fibre& fibre) { return fibre.state == State::kDone; };
  for (run_ready(); !std::all_of(fibres.begin(), fibres.end(), is_done); run_ready()) {
    for (const Fibre& fibre : fibres) {
      if (fibre.state == State::kAtExchange) exchange(fibre);
    }
    if (ready.empty()) pass_barrier();
  }
}

}  // namespace

Config::Config(Size grid, Size block, size_t shared_bytes, void*) : grid(grid), block(block) {
  if (shared_bytes > 0) give_up("shared memory of a launch is not emulated");
}

void run(const char* kernel_name, const Config& launched, void (*each)(const void*),
         const void* with, size_t bytes) {
  const Size &grid = launched.grid, &size = launched.block;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  // The limits of every device there is.
  if (threads == 0 || threads > kMostThreads || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 0xffffu || grid.z > 0xffffu) {
    refused = true;
    return;
  }
  if (stacks == nullptr) {
    void* const memory = mmap(nullptr, kMostThreads * kStackStride, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) give_up("no memory for the stacks of a block's threads");
    stacks = static_cast<char*>(memory);
  }
  name = kernel_name;
  config = launched;
  body = each;
  kernel = with;
  kernel_bytes = bytes;
  ++launch_number;
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) {
    order[i] = i;
    std::swap(order[i], order[random_below(i + 1)]);
  }
  for (const uint32_t number : order) {
    block_number = number;
    block = index_in(number, grid);
    run_block(static_cast<unsigned>(threads));
  }
}

bool take_refusal() { return std::exchange(refused, false); }

Size thread_index() { return current->index; }
Size block_index() { return block; }
Size block_size() { return config.block; }
Size grid_size() { return config.grid; }
bool is_mutant(int number) { return number == mutant; }

float from_half(uint16_t bits) { return fastdean::widen(fastdean::Half{bits}); }
float from_bfloat16(uint16_t bits) { return fastdean::widen(fastdean::BFloat16{bits}); }

uint16_t to_half(float value) {
  fastdean::Half half;
  fastdean::narrow(value, half);
  return half.bits;
}

uint16_t to_bfloat16(float value) {
  fastdean::BFloat16 half;
  fastdean::narrow(value, half);
  return half.bits;
}

void block_barrier(int line) {
  current->state = State::kAtBarrier;
  current->line = line;
  enter_host();
}

uint64_t from_lane_xor_bits(unsigned mask, uint64_t bits, unsigned step, int line) {
  Fibre& fibre = *current;
  const unsigned lane = fibre.thread % kWarp;
  if ((mask >> lane & 1) == 0) give_up("a lane exchanges outside of its mask");
  fibre.state = State::kAtExchange;
  fibre.line = line;
  fibre.mask = mask;
  fibre.source = (lane ^ step) % kWarp;
  fibre.bits = bits;
  enter_host();
  return fibre.bits;
}

Place here() {
  if (current == nullptr) return {};
  return {true, launch_number, block_number, current->epoch,
          static_cast<uint16_t>(current->thread)};
}

bool is_private(uintptr_t address) {
  const auto stack = reinterpret_cast<uintptr_t>(stack_of(*current));
  const auto arguments = reinterpret_cast<uintptr_t>(kernel);
  return address - stack < kStackBytes || address - arguments < kernel_bytes;
}

void yield() { enter_host(); }

// xorshift64*, and the upper half of a product in place of a remainder.
uint32_t random_below(uint64_t bound) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1du >> 32) * bound >> 32);
}

void report(const std::string& what) {
  const std::string line = std::string(name) + ": " + what;
  if (findings.seen.insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
  // A planted fault has been found; what else it does is of no interest.
  if (mutant >= 0) end();
}

}  // namespace emulated
