// The part of CUDA C++ that the kernels use, on a processor: for tests on machines without a GPU.
//
// Blocks run one after the other, the threads of a block as coroutines that give way to each other where threads
// wait: at barriers, in shuffles and tensor core products. In which order they run is up to the caller, so that a
// barrier that is missing shows. What is wrong in a way that a device would not forgive (threads that wait for each
// other forever, unaligned vectors) ends the launch with a message.
#pragma once

#include <algorithm>
#include <bit>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

namespace emulator {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;
// Behind the shared memory, to see whether a block wrote there.
constexpr size_t CANARY_BYTES = 64;
constexpr unsigned char CANARY = 0xa5;

struct Copy { void* to; const void* from; unsigned num_bytes; };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::vector<char> stack;
  dim3 thread;
  bool started, done;
  // It waits while `*gate == closed`.
  const unsigned* gate;
  unsigned closed;
  const char* waits_at;
  // Which of a warp's two sets of slots it uses next.
  unsigned phase;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> copies;
};

struct Barrier { unsigned num_arrived, generation; };
struct Slot { unsigned char bytes[64]; };
struct Warp { Barrier barrier; Slot slots[2][WARP]; };

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  dim3 index, grid, size;
  std::vector<unsigned char> shared;
};

static Block block;
static Fiber* current;
static jmp_buf scheduler;
static std::string problem;
static void (*kernel)(void**);
static void** arguments;

[[noreturn]] inline void fail(const std::string& what) {
  problem = what;
  _longjmp(scheduler, 2);
}

inline void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned num_threads, const char* where) {
  if (++barrier.num_arrived == num_threads) {
    barrier.num_arrived = 0;
    ++barrier.generation;
    return;
  }
  current->gate = &barrier.generation;
  current->closed = barrier.generation;
  current->waits_at = where;
  yield();
  current->gate = nullptr;
}

inline unsigned linear_thread() { return current->thread.x; }
inline unsigned lane() { return linear_thread() % WARP; }
inline Warp& warp() { return block.warps[linear_thread() / WARP]; }

/// Gives every lane of a warp what the others gave.
template <class T>
inline const Slot* exchange(const T& value, const char* where) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Slot* slots = warp().slots[current->phase++ % 2];
  memcpy(slots[lane()].bytes, &value, sizeof(T));
  wait(warp().barrier, WARP, where);
  return slots;
}

template <class T>
inline T read(const Slot& slot) {
  T value;
  memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

inline void enter() {
  kernel(arguments);
  current->done = true;
  _longjmp(scheduler, 1);
}

// Lets a thread go on until it waits or ends; false if something is wrong.
__attribute__((noinline)) inline bool resume(Fiber& fiber) {
  current = &fiber;
  int how = _setjmp(scheduler);
  if (how != 0) return how == 1;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
  abort();
}

inline void run_block(unsigned schedule) {
  for (auto& warp : block.warps) warp.barrier = {};
  block.barrier = {};
  // What was not written is no number.
  std::fill(block.shared.begin(), block.shared.end() - CANARY_BYTES, 0xff);
  std::fill(block.shared.end() - CANARY_BYTES, block.shared.end(), CANARY);
  std::vector<unsigned> order(block.fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  // The first thread first, the last one first, or shuffled.
  uint64_t state = schedule;
  if (schedule == 1) {
    for (unsigned i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
  } else if (schedule > 1) {
    for (unsigned i = order.size() - 1; i > 0; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
  }
  for (unsigned i = 0; i < block.fibers.size(); ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.stack.resize(STACK_BYTES);
    fiber.thread = {i, 0, 0};
    fiber.started = fiber.done = false;
    fiber.gate = nullptr;
    fiber.phase = 0;
    fiber.committed.clear();
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t num_running = order.size(); num_running > 0;) {
    bool is_any = false;
    for (unsigned thread : order) {
      Fiber& fiber = block.fibers[thread];
      if (fiber.done || (fiber.gate && *fiber.gate == fiber.closed)) continue;
      is_any = true;
      if (!resume(fiber)) return;
      num_running -= fiber.done;
    }
    if (is_any) continue;
    for (Fiber& fiber : block.fibers) {
      if (fiber.done) continue;
      problem = "thread " + std::to_string(fiber.thread.x) + " waits forever in " + fiber.waits_at;
      return;
    }
  }
}

template <class T>
constexpr char kind() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  else if constexpr (std::is_same_v<T, int>) return 'i';
  else if constexpr (std::is_same_v<T, float>) return 'f';
  else static_assert(sizeof(T) == 0, "kernels take pointers, int and float");
}

template <class... P, size_t... I>
void call(void (*function)(P...), void** arguments, std::index_sequence<I...>) {
  function(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
}

struct Entry { std::string name, kinds; void (*run)(void**); };
static std::vector<Entry> entries;

template <auto Function> struct Register;
template <class... P, void (*Function)(P...)>
struct Register<Function> {
  explicit Register(const char* name) {
    auto run = [](void** arguments) { call(Function, arguments, std::index_sequence_for<P...>()); };
    entries.push_back({name, std::string{kind<P>()...}, run});
  }
};

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::block.shared.data()
#define KERNEL(name) static emulator::Register<name> register_##name(#name);
#define __syncthreads() emulator::wait(emulator::block.barrier, blockDim.x, __func__)
#define __syncwarp() emulator::wait(emulator::warp().barrier, emulator::WARP, __func__)

template <class T>
inline T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  unsigned from = emulator::lane() ^ mask;
  return emulator::read<T>(emulator::exchange(value, "__shfl_xor_sync")[from]);
}

template <class T>
inline T __shfl_sync(unsigned, T value, unsigned from) {
  return emulator::read<T>(emulator::exchange(value, "__shfl_sync")[from % emulator::WARP]);
}

template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
  unsigned lane = emulator::lane();
  return emulator::read<T>(emulator::exchange(value, "__shfl_up_sync")[lane < distance ? lane : lane - distance]);
}

template <class T>
inline T atomicAdd(T* at, T x) {
  T before = *at;
  *at += x;
  return before;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::fmaf;
using std::max;
using std::min;

/// Launches a kernel. Returns what is wrong with it, or null.
///
/// `kinds` are those of the arguments: `p` for a pointer, `i` for an `int`, `f` for a `float`.
extern "C" __attribute__((visibility("default"))) const char* emulator_launch(const char* name, const unsigned* grid, unsigned num_threads,
                                       unsigned long shared_bytes, void** arguments, const char* kinds,
                                       unsigned schedule) {
  using namespace emulator;
  problem.clear();
  const Entry* found = nullptr;
  for (const Entry& entry : entries) {
    if (entry.name == name) found = &entry;
  }
  if (!found) problem = std::string("there is no kernel ") + name;
  else if (found->kinds != kinds) problem = std::string(name) + " takes " + found->kinds + ", was given " + kinds;
  else if (num_threads % WARP != 0 || num_threads > 1024) problem = "no whole number of warps, or too many";
  if (!problem.empty()) return problem.c_str();
  kernel = found->run;
  emulator::arguments = arguments;
  block.size = {num_threads, 1, 1};
  block.grid = {grid[0], grid[1], grid[2]};
  block.fibers.resize(num_threads);
  block.warps.resize(num_threads / WARP);
  block.shared.resize(shared_bytes + CANARY_BYTES);
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; ++x) {
        block.index = {x, y, z};
        run_block(schedule);
        for (size_t i = shared_bytes; i < block.shared.size(); ++i) {
          if (block.shared[i] != CANARY) problem = "writes behind its shared memory";
        }
        if (!problem.empty()) {
          problem = std::string(name) + ": " + problem;
          return problem.c_str();
        }
      }
  return nullptr;
}
