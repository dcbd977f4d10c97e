// What the kernels share: numbers of 16 bits, sums over warps and blocks, tensor core products.
//
// The sources are compiled for one model on one device, with its shape as constants:
// HIDDEN_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, ACTIVATION, BLOCK_SIZE (tokens of a KV block), and BF16, 1 or 0.
// Here alone stands what differs between a device and the emulator (emulator.h).

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr int WARP_SIZE = 32;

// A number of the model's type: bfloat16 or float16.
struct half_t { u16 bits; };

#ifndef FLOTILLA_EMULATOR

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define KERNEL(name)

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }
// The high half of a product.
__device__ __forceinline__ u64 high_product(u64 x, u64 y) { return __umul64hi(x, y); }

#if BF16
__device__ __forceinline__ float to_float(half_t x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ half_t to_half(float x) {
  half_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
__device__ __forceinline__ float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ half_t to_half(float x) {
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#endif

// Two numbers, the first in the low bits.
__device__ __forceinline__ u32 pack(float first, float second) {
  u32 y;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
#endif
  return y;
}

// d += a b for a tile of 16 rows, 16 inner and 8 columns. Of lane `4 r + c`, a holds rows r and r + 8 at
// columns 2c, 2c + 1, then the same at columns 8 on; b rows 2c, 2c + 1, then 8 on, at column r; d rows r
// and r + 8 at columns 2c, 2c + 1.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Four tiles of 8 by 8 from shared memory: lane i gives the address of row i % 8 of tile i / 8, and gets of each
// tile the numbers at row i / 4, columns 2 (i % 4) and the next.
__device__ __forceinline__ void load_tiles(u32 (&r)[4], const half_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same with each tile transposed.
__device__ __forceinline__ void load_tiles_transposed(u32 (&r)[4], const half_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Begins to copy 16 bytes to shared memory; zeros where `is_there` is false.
__device__ __forceinline__ void begin_copy(void* to, const void* from, bool is_there) {
  int num_bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(num_bytes) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for those of the last N groups.
template <int N>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

#else

inline float minus_infinity() { return -HUGE_VALF; }
inline u32 bits_of(float x) { return std::bit_cast<u32>(x); }
inline float float_of(u32 bits) { return std::bit_cast<float>(bits); }
inline u64 high_product(u64 x, u64 y) { return u64((unsigned __int128)x * y >> 64); }

#if BF16
inline float to_float(half_t x) {
  return float_of(u32(x.bits) << 16);
}
inline half_t to_half(float x) {
  u32 bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
#else
inline float to_float(half_t x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return y;
}
inline half_t to_half(float x) {
  _Float16 y = x;
  half_t z;
  memcpy(&z, &y, 2);
  return z;
}
#endif

inline u32 pack(float first, float second) { return to_half(first).bits | u32(to_half(second).bits) << 16; }

inline float half_of(u32 pair, int i) { return to_float({u16(i == 0 ? pair : pair >> 16)}); }

inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Operands { u32 a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const emulator::Slot* slots = emulator::exchange(mine, "multiply");
  Operands all[WARP_SIZE];
  for (int i = 0; i < WARP_SIZE; ++i) all[i] = emulator::read<Operands>(slots[i]);
  int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands& left = all[row % 8 * 4 + k % 8 / 2];
      const Operands& right = all[column * 4 + k % 8 / 2];
      float x = half_of(left.a[row / 8 + 2 * (k / 8)], k % 2);
      d[i] = fmaf(x, half_of(right.b[k / 8], k % 2), d[i]);
    }
  }
}

inline void load_tiles(u32 (&r)[4], const half_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("load_tiles: a row is not aligned");
  const emulator::Slot* slots = emulator::exchange(row, "load_tiles");
  int lane = emulator::lane();
  for (int tile = 0; tile < 4; ++tile) {
    memcpy(&r[tile], emulator::read<const half_t*>(slots[8 * tile + lane / 4]) + 2 * (lane % 4), 4);
  }
}

inline void load_tiles_transposed(u32 (&r)[4], const half_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("load_tiles_transposed: a row is not aligned");
  const emulator::Slot* slots = emulator::exchange(row, "load_tiles_transposed");
  int lane = emulator::lane();
  for (int tile = 0; tile < 4; ++tile) {
    u32 pair = 0;
    for (int i = 0; i < 2; ++i) {
      pair |= u32(emulator::read<const half_t*>(slots[8 * tile + 2 * (lane % 4) + i])[lane / 4].bits) << 16 * i;
    }
    r[tile] = pair;
  }
}

// What is copied is there when it was waited for, not before.
inline void begin_copy(void* to, const void* from, bool is_there) {
  auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!is_aligned(to) || !is_aligned(from)) emulator::fail("begin_copy: not aligned");
  emulator::current->copies.push_back({to, is_there ? from : nullptr, 16});
}

inline void commit_copies() {
  emulator::current->committed.push_back(std::move(emulator::current->copies));
  emulator::current->copies.clear();
}

template <int N>
inline void wait_for_copies() {
  auto& groups = emulator::current->committed;
  size_t num_done = groups.size() > N ? groups.size() - N : 0;
  for (size_t i = 0; i < num_done; ++i) {
    for (const auto& copy : groups[i]) {
      if (copy.from) memcpy(copy.to, copy.from, copy.num_bytes);
      else memset(copy.to, 0, copy.num_bytes);
    }
  }
  groups.erase(groups.begin(), groups.begin() + num_done);
}

#endif

// Eight numbers, which are loaded and stored at once.
struct alignas(16) half8 { half_t x[8]; };

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(FULL_WARP, x, mask);
  return x;
}

// The sum over a block of up to 1,024 threads, for each of them.
__device__ __forceinline__ float sum_of_block(float x) {
  __shared__ float sums[WARP_SIZE];
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  x = sum_of_warp(x);
  // Whoever reads the sums of the call before has to be through.
  __syncthreads();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  x = lane < int(blockDim.x / WARP_SIZE) ? sums[lane] : 0.0f;
  return sum_of_warp(x);
}
