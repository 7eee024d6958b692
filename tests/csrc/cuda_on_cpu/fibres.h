// What the race detector and the machine know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulated {

// Which thread runs now. Between two barriers of a block, its threads are in the same epoch.
struct Place {
  bool on_device;  // false on the host's side of a launch
  uint32_t launch, block, epoch;
  uint16_t thread;
};

Place here();

// Memory that is no device's: the running thread's stack, and the launch's arguments.
bool is_private(uintptr_t address);

// Lets other threads of the block run.
void yield();

// 0 .. bound - 1.
uint32_t random_below(uint64_t bound);

// Prints a finding once; the process then ends with a status of its own.
void report(const std::string& what);

}  // namespace emulated
