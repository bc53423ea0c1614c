// Lets the host compiler build and run the CUDA sources of csrc/: one fiber per thread, one launch at a
// time, threads and blocks in an order that the test chooses.
//
// A fiber runs until it waits (__syncthreads, a shuffle) or, in random order, reaches a fence or an
// atomic; then the first in line that can goes on. Up to `resident` blocks are alive at once; each has
// its own copy of the __shared__ variables, poisoned when it starts. Waiting that can never end aborts.
// Memory order is not modelled: every thread sees every write at once.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- the language ----

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// One section holds them all, so that a block's copy can be saved and restored. Inline functions only:
// g++ ignores the section inside a template.
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory[] __attribute__((weak));
extern "C" char __stop_shared_memory[] __attribute__((weak));

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// ---- the machine ----

namespace emulation {

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  int multiprocessors = 1;  // what the device reports: decides the grid
  unsigned resident = 1;    // blocks alive at once: they take turns in random order
  unsigned seed = 0;        // of the random order
};
inline Settings settings;

constexpr size_t kStack = 96 << 10;
constexpr unsigned kWarp = 32;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  unsigned thread, shuffles;
  void* fake_stack;  // AddressSanitizer's
};

struct Warp {
  uint64_t value[2][kWarp];  // two sets: a lane can be one shuffle ahead of its neighbours
  unsigned waiting;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> line;         // its threads, first in line first
  std::vector<unsigned char> shared;  // while another block runs
  unsigned index, waiting, alive;
};

struct Machine {
  ucontext_t scheduler;
  void* fake_stack;
  void const* stack;  // the scheduler's own
  size_t stack_size;
  std::function<void()> kernel;
  std::mt19937 random;
  Block* block = nullptr;  // the one whose variables lie in the section
  Fiber* fiber = nullptr;
  bool preempted = false;  // in favour of another block
  bool released = false;   // others can go on, or the line has changed
};
inline Machine machine;

[[noreturn]] inline void die(char const* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Both sides of a switch tell AddressSanitizer which stack is in use.
inline void before_switch([[maybe_unused]] void** save, [[maybe_unused]] void const* stack,
                          [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}
inline void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] void const** stack,
                         [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

// From the running fiber to the scheduler, and back when it is that fiber's turn again.
inline void leave(State state) {
  Fiber& fiber = *machine.fiber;
  fiber.state = state;
  before_switch(state == State::done ? nullptr : &fiber.fake_stack, machine.stack, machine.stack_size);
  swapcontext(&fiber.context, &machine.scheduler);
  after_switch(fiber.fake_stack, &machine.stack, &machine.stack_size);
}

inline void fiber_main() {
  after_switch(nullptr, &machine.stack, &machine.stack_size);
  machine.kernel();
  leave(State::done);
}

// Byte by byte and unseen by the sanitizer: the section has gaps.
__attribute__((no_sanitize("address", "undefined"))) inline void copy(unsigned char* to,
                                                                      unsigned char const* from, size_t n) {
  for (size_t i = 0; i < n; ++i) static_cast<unsigned char volatile*>(to)[i] = from[i];
}

inline void make_current(Block& block) {
  auto* const shared = reinterpret_cast<unsigned char*>(__start_shared_memory);
  size_t const size = __stop_shared_memory - __start_shared_memory;
  if (machine.block == &block) return;
  if (machine.block) copy(machine.block->shared.data(), shared, size);
  copy(shared, block.shared.data(), size);
  machine.block = &block;
}

inline void resume(Block& block, Fiber& fiber) {
  make_current(block);
  blockIdx = dim3(block.index);
  threadIdx = dim3(fiber.thread);
  machine.fiber = &fiber;
  before_switch(&machine.fake_stack, fiber.stack.get(), kStack);
  swapcontext(&machine.scheduler, &fiber.context);
  after_switch(machine.fake_stack, nullptr, nullptr);
}

inline void start(Block& block, unsigned index) {
  block.index = index;
  block.waiting = 0;
  block.alive = blockDim.x;
  block.shared.assign(__stop_shared_memory - __start_shared_memory, 0xff);  // NaN, not a bool
  block.warps.assign((blockDim.x + kWarp - 1) / kWarp, Warp{});
  block.fibers.resize(blockDim.x);
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.state = State::ready;
    fiber.thread = t;
    fiber.shuffles = 0;
    fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  block.line.resize(blockDim.x);
  for (unsigned t = 0; t < blockDim.x; ++t)
    block.line[t] = settings.order == Order::reverse ? blockDim.x - 1 - t : t;
  if (settings.order == Order::random) std::shuffle(block.line.begin(), block.line.end(), machine.random);
}

inline bool chance(unsigned one_in) {
  return settings.order == Order::random && machine.random() % one_in == 0;
}

// Runs the block until none of its threads can go on or another block's turn comes; false when none
// could run. It is always the first ready thread in line that runs: a warp gets as far ahead of the
// others as the barriers let it.
inline bool advance(Block& block) {
  bool any = false;
  for (size_t i = 0; i < block.line.size();) {
    Fiber& fiber = block.fibers[block.line[i]];
    if (fiber.state != State::ready) {
      ++i;
      continue;
    }
    any = true;
    machine.released = false;
    resume(block, fiber);
    if (fiber.state == State::done && --block.alive > 0 && block.waiting == block.alive)
      die("a thread has left the kernel while the others wait at __syncthreads");
    if (chance(1000)) {
      std::shuffle(block.line.begin(), block.line.end(), machine.random);
      machine.released = true;
    }
    if (machine.preempted || chance(10000)) break;
    if (machine.released) i = 0;  // one in front may be ready again
  }
  machine.preempted = false;
  return any;
}

inline void run(unsigned blocks, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  machine.random.seed(settings.seed);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = settings.order == Order::reverse ? blocks - 1 - i : i;
  if (settings.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);

  static std::vector<std::unique_ptr<Block>> pool;  // stacks are kept for the next launch
  while (pool.size() < settings.resident) pool.push_back(std::make_unique<Block>());
  std::vector<Block*> idle, alive;
  for (unsigned i = 0; i < settings.resident; ++i) idle.push_back(pool[i].get());
  unsigned next = 0;
  machine.block = nullptr;
  while (next < blocks || !alive.empty()) {
    while (next < blocks && !idle.empty()) {
      start(*idle.back(), order[next++]);
      alive.push_back(idle.back());
      idle.pop_back();
    }
    if (settings.order == Order::random) std::shuffle(alive.begin(), alive.end(), machine.random);
    Block* const block = alive.back();
    if (!advance(*block)) die("deadlock: threads wait in different places");
    if (block->alive > 0) continue;
    idle.push_back(block);
    alive.pop_back();
    if (machine.block == block) machine.block = nullptr;
  }
}

// A point where another thread or block may come in between.
inline void preempt() {
  if (settings.order != Order::random) return;
  std::vector<unsigned>& line = machine.block->line;
  std::shuffle(line.begin(), line.end(), machine.random);
  machine.preempted = chance(2);
  machine.released = true;
  leave(State::ready);
}

template <typename T>
T exchange(T mine, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& fiber = *machine.fiber;
  Warp& warp = machine.block->warps[fiber.thread / kWarp];
  uint64_t* const values = warp.value[fiber.shuffles++ % 2];
  std::memcpy(&values[fiber.thread % kWarp], &mine, sizeof mine);
  if (++warp.waiting == kWarp) {
    warp.waiting = 0;
    unsigned const first = fiber.thread / kWarp * kWarp;
    for (unsigned t = first; t < first + kWarp; ++t)
      if (t != fiber.thread) machine.block->fibers[t].state = State::ready;
    machine.released = true;
    leave(State::ready);
  } else {
    leave(State::at_shuffle);
  }
  T theirs;
  std::memcpy(&theirs, &values[source], sizeof theirs);
  return theirs;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Block& block = *emulation::machine.block;
  if (++block.waiting < block.alive) return emulation::leave(emulation::State::at_barrier);
  block.waiting = 0;
  emulation::machine.released = true;
  for (emulation::Fiber& fiber : block.fibers)
    if (fiber.state == emulation::State::at_barrier) fiber.state = emulation::State::ready;
  emulation::leave(emulation::State::ready);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  if (mask != 0xffffffffu) emulation::die("a shuffle of part of a warp");
  return emulation::exchange(value, (threadIdx.x ^ lanes) % emulation::kWarp);
}

inline void __threadfence() { emulation::preempt(); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  emulation::preempt();
  unsigned const old = *at;
  *at += value;
  emulation::preempt();
  return old;
}
template <typename T>
T __ldcg(T const* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

// ---- the runtime ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline char const* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::settings.multiprocessors, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Params...),
                               Args const&... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  std::tuple<Params...> const params(args...);
  emulation::run(gridDim.x, [&] { std::apply(kernel, params); });
  return cudaSuccess;
}
