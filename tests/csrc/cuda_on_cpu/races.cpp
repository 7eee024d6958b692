// The race detector: every access of a kernel to global or shared memory against earlier ones.
//
// The compiler calls the functions at the end before each access (-fsanitize=thread); its own
// runtime, which knows system threads only, is not linked. Two accesses to the same memory race if
// one of them writes, not both are atomic, and they are of two blocks of a launch or of two threads
// of a block with no barrier between. That depends on the source and on sizes, hardly on the order
// in which threads happen to run. Exchanges between lanes order no memory.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

#include "fibres.h"
#include "machine.h"

// From the linker: where the program starts, and its variables, of which __shared__ ones are some.
extern "C" char __executable_start, __data_start, _end;

namespace emulated {
namespace {

constexpr uint32_t kManyBlocks = ~uint32_t{0};
constexpr uint16_t kManyThreads = ~uint16_t{0};
// One in so many accesses lets other threads run.
constexpr uint64_t kYieldEvery = 64;

enum class Kind : uint8_t { kNone, kPlain, kAtomic };

struct Access {
  uint32_t block, epoch, site;
  uint16_t thread;
  Kind kind;
};

struct Cell {
  Access write, read;
};

// No element is smaller.
constexpr uintptr_t kCellBytes = 2;
constexpr uintptr_t kPageBytes = 4096;

struct Page {
  uintptr_t number;
  uint32_t launch;  // that its cells are of
  Cell cells[kPageBytes / kCellBytes];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* recent[1024];

Page& page_of(uintptr_t address, uint32_t launch) {
  const uintptr_t number = address / kPageBytes;
  Page*& page = recent[number % (sizeof recent / sizeof *recent)];
  if (page == nullptr || page->number != number) {
    auto& owner = pages[number];
    if (owner == nullptr) {
      owner.reset(new Page);
      owner->number = number;
      owner->launch = 0;
    }
    page = owner.get();
  }
  if (page->launch != launch) {
    std::memset(static_cast<void*>(page->cells), 0, sizeof page->cells);
    page->launch = launch;
  }
  return *page;
}

bool is_shared(uintptr_t address) {
  const auto start = reinterpret_cast<uintptr_t>(&__data_start);
  return address - start < reinterpret_cast<uintptr_t>(&_end) - start;
}

// For addr2line.
std::string text_of(uint32_t site) {
  char text[16];
  std::snprintf(text, sizeof text, "+0x%x", site);
  return text;
}

void compare(const Access& before, const Access& now, const char* what) {
  if (before.kind == Kind::kNone) return;
  if (before.kind == Kind::kAtomic && now.kind == Kind::kAtomic) return;
  const bool other_block = before.block != now.block;
  if (!other_block && (before.thread == now.thread || before.epoch != now.epoch)) return;
  report(std::string("race, ") + what + " of another " + (other_block ? "block" : "thread") + ": " +
         text_of(now.site) + " after " + text_of(before.site));
}

// `kept` stands for all reads, or all atomic writes, that a later access may race with.
void join(Access& kept, const Access& now) {
  if (kept.kind == Kind::kNone) {
    kept = now;
    return;
  }
  if (kept.block != now.block) kept.block = kManyBlocks;
  if (kept.epoch != now.epoch) {
    kept.epoch = now.epoch;
    kept.thread = now.thread;
  } else if (kept.thread != now.thread) {
    kept.thread = kManyThreads;
  }
  if (now.kind == Kind::kPlain) kept.kind = Kind::kPlain;
  kept.site = now.site;
}

void visit(const void* start, uintptr_t bytes, bool reads, bool writes, Kind kind,
           const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(start);
  const Place place = here();
  if (!place.on_device || is_private(address)) return;
  const auto offset = static_cast<const char*>(site) - &__executable_start - 1;
  const Access now = {place.block, place.epoch, static_cast<uint32_t>(offset), place.thread, kind};
  const bool shared = is_shared(address);
  for (uintptr_t at = address / kCellBytes * kCellBytes; at < address + bytes; at += kCellBytes) {
    Cell& cell = page_of(at, place.launch).cells[at % kPageBytes / kCellBytes];
    // Shared memory starts anew with each block.
    const uint32_t owner = cell.write.kind != Kind::kNone ? cell.write.block : cell.read.block;
    if (shared && owner != place.block) cell = {};
    if (reads && shared && cell.write.kind == Kind::kNone) {
      report("reads shared memory that its block has not written: " + text_of(now.site));
    }
    compare(cell.write, now, writes ? "a write after a write" : "a read after a write");
    if (writes) compare(cell.read, now, "a write after a read");
    if (writes && kind == Kind::kAtomic) join(cell.write, now);
    if (writes && kind == Kind::kPlain) cell.write = now;
    if (reads) join(cell.read, now);
  }
  if (random_below(kYieldEvery) == 0) yield();
}

}  // namespace

int exchange_atomically(int* address, int value) {
  visit(address, sizeof *address, true, true, Kind::kAtomic, __builtin_return_address(0));
  const int before = *address;
  *address = value;
  return before;
}

}  // namespace emulated

using emulated::Kind;
using emulated::visit;

#define FASTDEAN_HOOKS(bytes)                                                 \
  void __tsan_read##bytes(void* at) {                                         \
    visit(at, bytes, true, false, Kind::kPlain, __builtin_return_address(0)); \
  }                                                                           \
  void __tsan_write##bytes(void* at) {                                        \
    visit(at, bytes, false, true, Kind::kPlain, __builtin_return_address(0)); \
  }                                                                           \
  void __tsan_unaligned_read##bytes(void* at) {                               \
    visit(at, bytes, true, false, Kind::kPlain, __builtin_return_address(0)); \
  }                                                                           \
  void __tsan_unaligned_write##bytes(void* at) {                              \
    visit(at, bytes, false, true, Kind::kPlain, __builtin_return_address(0)); \
  }

extern "C" {
void __tsan_init() {}
FASTDEAN_HOOKS(1)
FASTDEAN_HOOKS(2)
FASTDEAN_HOOKS(4)
FASTDEAN_HOOKS(8)
FASTDEAN_HOOKS(16)
void __tsan_read_range(void* at, uintptr_t bytes) {
  visit(at, bytes, true, false, Kind::kPlain, __builtin_return_address(0));
}
void __tsan_write_range(void* at, uintptr_t bytes) {
  visit(at, bytes, false, true, Kind::kPlain, __builtin_return_address(0));
}
}
