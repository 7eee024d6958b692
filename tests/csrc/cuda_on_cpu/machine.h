// A machine for CUDA kernels on a CPU: blocks one after the other in random order, a block's threads
// as fibres of one system thread, taken in random order too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Size {
  unsigned x, y, z;
  constexpr Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct Config {
  Size grid, block;
  Config(Size grid, Size block, size_t shared_bytes, void* stream);
};

// Runs `body(kernel)` once for every thread. `bytes` is the size of what `kernel` points to, which
// holds the arguments. What a device would refuse is not run, and take_refusal() says so once.
void run(const char* name, const Config& config, void (*body)(const void*), const void* kernel,
         size_t bytes);
bool take_refusal();

// What name<<<config>>>(arguments) is turned into.
template <class Kernel>
void launch(const char* name, const Config& config, const Kernel& kernel) {
  const auto body = [](const void* each) { (*static_cast<const Kernel*>(each))(); };
  run(name, config, body, &kernel, sizeof kernel);
}

// By value, and constant for whoever asks: the race detector must not see these being read, nor the
// compiler ask twice.
#define FASTDEAN_CONSTANT __attribute__((const))
FASTDEAN_CONSTANT Size thread_index();
FASTDEAN_CONSTANT Size block_index();
FASTDEAN_CONSTANT Size block_size();
FASTDEAN_CONSTANT Size grid_size();

// Whether the fault of this number is planted in this run: FASTDEAN_MUTANT.
FASTDEAN_CONSTANT bool is_mutant(int number);

void block_barrier(int line);
uint64_t from_lane_xor_bits(unsigned mask, uint64_t bits, unsigned step, int line);

template <class T>
T from_lane_xor(unsigned mask, T value, unsigned step, int line) {
  static_assert(sizeof value <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = from_lane_xor_bits(mask, bits, step, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int exchange_atomically(int* address, int value);

// As csrc/floats.h has it, whose names would meet those of the kernels.
float from_half(uint16_t bits);
float from_bfloat16(uint16_t bits);
uint16_t to_half(float value);
uint16_t to_bfloat16(float value);

}  // namespace emulated
