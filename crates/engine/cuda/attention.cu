// Attention over the paged KV cache: flash attention on tensor cores, for prompts and for answers.
//
// The queries of a group (those of one KV head) are rows of one tile, several tokens' one after the other: row r is head
// r % GROUP of token r / GROUP. So a key is read once for its whole group. A prompt's tile has 16 rows for each warp, and all
// warps go through all keys. A token that decodes has GROUP rows only: its warps share the keys, and blocks share long sequences, SPLIT_KEYS
// each, whose partial results `combine` puts together. Where the keys are cut depends on their positions alone, so the result
// of a row does not depend on what else is in the step.
//
// In:  qkv (num_tokens, NUM_HEADS + 2 NUM_KV_HEADS, HEAD_DIM), rotated
//      keys, values (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
//      tables: blocks of the sequences, one sequence's behind the other's
// Out: out (num_tokens, NUM_HEADS, HEAD_DIM)

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int NUM_PROJECTED = NUM_HEADS + 2 * NUM_KV_HEADS;
// Dimensions that are computed with: behind those of a head are zeros.
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;
// Numbers from a row to the next in shared memory: no two of eight rows begin in the same bank.
constexpr int STRIDE = DIM + 8;
constexpr int TILE_ROWS = 16;
constexpr int TILE_KEYS = HEAD_DIM > 128 ? 32 : 64;
constexpr int PREFILL_WARPS = 4;
constexpr int DECODE_WARPS = TILE_KEYS / 16;
constexpr float LOG2_E = 1.44269504088896341f;

// Which keys a query sees, and how their scores are made.
struct Sight {
  // Tokens, itself included.
  int window;
  float scale, cap;
};

// What 16 rows have seen so far. Of lane 4 r + c the first of each pair is row r's, the second row r + 8's.
struct Seen {
  float max[2], sum[2];
  // Columns 8 n + 2 c and the next, of row r and then r + 8.
  float out[DIM / 8][4];
};

__device__ __forceinline__ void begin(Seen& seen) {
#pragma unroll
  for (int half = 0; half < 2; ++half) seen.max[half] = minus_infinity(), seen.sum[half] = 0.0f;
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n) seen.out[n][0] = seen.out[n][1] = seen.out[n][2] = seen.out[n][3] = 0.0f;
}

// Queries of the rows from `first_row` on, as left-hand sides of products. `num_rows` there are in all.
__device__ __forceinline__ void load_queries(u32 (&query)[DIM / 16][4], const half_t* qkv, int first_token, int kv_head,
                                             int first_row, int num_rows) {
  int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int row = first_row + lane / 4 + 8 * (i % 2);
    const half_t* head =
        qkv + (u64(first_token + row / GROUP) * NUM_PROJECTED + kv_head * GROUP + row % GROUP) * HEAD_DIM;
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d) {
      int dim = 16 * d + 8 * (i / 2) + 2 * (lane % 4);
      query[d][i] = row < num_rows && dim < HEAD_DIM ? *reinterpret_cast<const u32*>(head + dim) : 0;
    }
  }
}

// Begins to copy TILE_KEYS keys or values to shared memory, (TILE_KEYS, STRIDE). Behind `end` there are zeros.
__device__ __forceinline__ void begin_tile(half_t* tile, const half_t* cache, const int* table, int kv_head, int first_key, int end) {
  constexpr int PARTS = DIM / 8;
  for (int i = threadIdx.x; i < TILE_KEYS * PARTS; i += blockDim.x) {
    int row = i / PARTS, dim = 8 * (i % PARTS), key = first_key + row;
    bool is_there = key < end && dim < HEAD_DIM;
    const half_t* from = cache;
    if (is_there) {
      u64 block = table[key / BLOCK_SIZE];
      from += ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM + dim;
    }
    begin_copy(tile + row * STRIDE + dim, from, is_there);
  }
}

// Lets a warp's 16 rows see NUM_KEYS keys, which begin with `first_key`. `position` is that of both rows of this lane;
// a row that is not there has position -1 and sees nothing.
template <int NUM_KEYS>
__device__ __forceinline__ void see(Seen& seen, const u32 (&query)[DIM / 16][4], const half_t* keys, const half_t* values,
                                    int first_key, const int (&position)[2], Sight sight) {
  int lane = threadIdx.x % WARP_SIZE;
  float scores[NUM_KEYS / 8][4];
#pragma unroll
  for (int n = 0; n < NUM_KEYS / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[2 * n][i] = scores[2 * n + 1][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d) {
      u32 key[4];
      load_tiles(key, keys + (16 * n + lane % 8 + 8 * (lane / 16)) * STRIDE + 16 * d + 8 * (lane / 8 % 2));
      multiply(scores[2 * n], query[d], key[0], key[1]);
      multiply(scores[2 * n + 1], query[d], key[2], key[3]);
    }
  }
  float max_score[2] = {seen.max[0], seen.max[1]};
#pragma unroll
  for (int n = 0; n < NUM_KEYS / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int key = first_key + 8 * n + 2 * (lane % 4) + i % 2, at = position[i / 2];
      float score = scores[n][i] * sight.scale;
      if (sight.cap > 0.0f) score = sight.cap * tanhf(score / sight.cap);
      bool is_seen = key <= at && key > at - sight.window;
      scores[n][i] = is_seen ? score * LOG2_E : minus_infinity();
      max_score[i / 2] = fmaxf(max_score[i / 2], scores[n][i]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& largest = max_score[half];
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
    // A row that has seen nothing yet.
    float shift = largest == minus_infinity() ? 0.0f : largest;
    float fade = exp2f(seen.max[half] - shift);
    seen.max[half] = largest;
    seen.sum[half] *= fade;
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) seen.out[n][2 * half] *= fade, seen.out[n][2 * half + 1] *= fade;
#pragma unroll
    for (int n = 0; n < NUM_KEYS / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = exp2f(scores[n][i] - shift);
        seen.sum[half] += scores[n][i];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < NUM_KEYS / 16; ++k) {
    const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
    u32 weights[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d) {
      u32 value[4];
      load_tiles_transposed(value, values + (16 * k + lane % 16) * STRIDE + 16 * d + 8 * (lane / 16));
      multiply(seen.out[2 * d], weights, value[0], value[1]);
      multiply(seen.out[2 * d + 1], weights, value[2], value[3]);
    }
  }
}

// Goes through the keys from `first_key` (a multiple of TILE_KEYS) to `end`: a tile is copied while the one before it is computed with.
// With SPLIT each warp sees its own 16 keys of a tile, without it all of them.
template <bool SPLIT>
__device__ __forceinline__ void see_all(Seen& seen, const u32 (&query)[DIM / 16][4], half_t* shared, const half_t* keys,
                                        const half_t* values, const int* table, int kv_head, int first_key, int end,
                                        const int (&position)[2], Sight sight) {
  constexpr int TILE = TILE_KEYS * STRIDE;
  // (2 stages, keys and values, TILE_KEYS, STRIDE)
  begin_tile(shared, keys, table, kv_head, first_key, end);
  begin_tile(shared + TILE, values, table, kv_head, first_key, end);
  commit_copies();
  int stage = 0;
  for (int key = first_key; key < end; key += TILE_KEYS) {
    half_t* tile = shared + stage * 2 * TILE;
    stage ^= 1;
    half_t* next = shared + stage * 2 * TILE;
    if (key + TILE_KEYS < end) {
      begin_tile(next, keys, table, kv_head, key + TILE_KEYS, end);
      begin_tile(next + TILE, values, table, kv_head, key + TILE_KEYS, end);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    if (SPLIT) {
      int first = 16 * (threadIdx.x / WARP_SIZE);
      see<16>(seen, query, tile + first * STRIDE, tile + TILE + first * STRIDE, key + first, position, sight);
    } else {
      see<TILE_KEYS>(seen, query, tile, tile + TILE, key, position, sight);
    }
    // The next round's copies go where this one's keys are.
    __syncthreads();
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    seen.sum[half] += __shfl_xor_sync(FULL_WARP, seen.sum[half], 1);
    seen.sum[half] += __shfl_xor_sync(FULL_WARP, seen.sum[half], 2);
  }
}

// The first key of a tile that a query at `position` may see.
__device__ __forceinline__ int first_tile(int position, int window, int step) {
  int first = position - window + 1;
  return first > 0 ? first / step * step : 0;
}

// Tokens of prompts. Grid (num_items, NUM_KV_HEADS), blocks of PREFILL_WARPS warps; shared memory for 2 stages of keys and values.
//
// An item is {first token in qkv, tokens (at most PREFILL_WARPS * 16 / GROUP, or 1), position of the first, place of its table}.
extern "C" __global__ void __launch_bounds__(PREFILL_WARPS * WARP_SIZE)
attend_prefill(const int* items, const half_t* qkv, const half_t* keys, const half_t* values, const int* tables, int window, float scale, float cap, half_t* out) {
  DYNAMIC_SHARED(memory);
  half_t* shared = reinterpret_cast<half_t*>(memory);
  const int* item = items + 4 * blockIdx.x;
  int first_token = item[0], num_tokens = item[1], first_position = item[2];
  const int* table = tables + item[3];
  int kv_head = blockIdx.y, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  int end = first_position + num_tokens, first_key = first_tile(first_position, window, TILE_KEYS);
  Sight sight = {window, scale, cap};
  // More rows than warps have where a group has more than 64 heads.
  for (int base = 0; base < num_tokens * GROUP; base += PREFILL_WARPS * TILE_ROWS) {
    int first_row = base + warp * TILE_ROWS, num_rows = num_tokens * GROUP;
    u32 query[DIM / 16][4];
    load_queries(query, qkv, first_token, kv_head, first_row, num_rows);
    int position[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = first_row + lane / 4 + 8 * half;
      position[half] = row < num_rows ? first_position + row / GROUP : -1;
    }
    Seen seen;
    begin(seen);
    see_all<false>(seen, query, shared, keys, values, table, kv_head, first_key, end, position, sight);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = first_row + lane / 4 + 8 * half;
      if (row >= num_rows) continue;
      float inverse = 1.0f / seen.sum[half];
      half_t* to = out + (u64(first_token + row / GROUP) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_DIM;
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) {
        int dim = 8 * n + 2 * (lane % 4);
        if (dim >= HEAD_DIM) continue;
        *reinterpret_cast<u32*>(to + dim) = pack(seen.out[n][2 * half] * inverse, seen.out[n][2 * half + 1] * inverse);
      }
    }
  }
}
KERNEL(attend_prefill)

#if NUM_HEADS <= 16 * NUM_KV_HEADS
// Tokens that decode, of groups of up to 16 heads. Grid (num_items, NUM_KV_HEADS), blocks of DECODE_WARPS warps; shared memory as for prompts.
//
// An item is {token in qkv or -1 for none, position, place of its table, first key, end of the keys, place of its partial result or -1}. Partial results
// are (num_partials, NUM_HEADS, HEAD_DIM + 2): a weighted sum, the largest score, and the sum of the weights. Without
// a place for it the item sees all keys of its token, and the result is written to `out`.
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP_SIZE)
attend_decode(const int* items, const half_t* qkv, const half_t* keys, const half_t* values, const int* tables, int window, float scale, float cap, float* partials, half_t* out) {
  DYNAMIC_SHARED(memory);
  half_t* shared = reinterpret_cast<half_t*>(memory);
  const int* item = items + 6 * blockIdx.x;
  int token = item[0], at = item[1], end = item[4], partial = item[5];
  const int* table = tables + item[2];
  if (token < 0) return;
  int kv_head = blockIdx.y, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  int first_key = max(item[3], first_tile(at, window, TILE_KEYS));
  u32 query[DIM / 16][4];
  load_queries(query, qkv, token, kv_head, 0, GROUP);
  int position[2] = {lane / 4 < GROUP ? at : -1, lane / 4 + 8 < GROUP ? at : -1};
  Seen seen;
  begin(seen);
  see_all<true>(seen, query, shared, keys, values, table, kv_head, first_key, end, position, {window, scale, cap});
  // What the warps have seen: sums (DECODE_WARPS, 16, DIM), then largest scores and weights (DECODE_WARPS, 16) each.
  float* sums = reinterpret_cast<float*>(memory);
  float* maxima = sums + DECODE_WARPS * TILE_ROWS * DIM;
  float* weights = maxima + DECODE_WARPS * TILE_ROWS;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = warp * TILE_ROWS + lane / 4 + 8 * half;
    if (lane % 4 == 0) maxima[row] = seen.max[half], weights[row] = seen.sum[half];
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) {
      float2 pair = {seen.out[n][2 * half], seen.out[n][2 * half + 1]};
      *reinterpret_cast<float2*>(sums + row * DIM + 8 * n + 2 * (lane % 4)) = pair;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += blockDim.x) {
    int row = i / HEAD_DIM, dim = i % HEAD_DIM, head = kv_head * GROUP + row;
    float largest = minus_infinity(), weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; ++w) largest = fmaxf(largest, maxima[w * TILE_ROWS + row]);
    float shift = largest == minus_infinity() ? 0.0f : largest;
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; ++w) {
      float fade = exp2f(maxima[w * TILE_ROWS + row] - shift);
      weight += weights[w * TILE_ROWS + row] * fade;
      sum += sums[(w * TILE_ROWS + row) * DIM + dim] * fade;
    }
    if (partial < 0) {
      out[(u64(token) * NUM_HEADS + head) * HEAD_DIM + dim] = to_half(sum / weight);
      continue;
    }
    float* to = partials + (u64(partial) * NUM_HEADS + head) * (HEAD_DIM + 2);
    to[dim] = sum;
    if (dim == 0) to[HEAD_DIM] = largest, to[HEAD_DIM + 1] = weight;
  }
}
KERNEL(attend_decode)

// Puts partial results together. Grid (num_items, NUM_HEADS); an item is {token, first partial, partials or 0 for none}.
extern "C" __global__ void combine(const int* items, const float* partials, half_t* out) {
  const int* item = items + 3 * blockIdx.x;
  int token = item[0], first = item[1], num = item[2], head = blockIdx.y;
  if (num == 0) return;
  float largest = minus_infinity();
  auto part = [&](int i) { return partials + (u64(first + i) * NUM_HEADS + head) * (HEAD_DIM + 2); };
  for (int i = 0; i < num; ++i) largest = fmaxf(largest, part(i)[HEAD_DIM]);
  for (int dim = threadIdx.x; dim < HEAD_DIM; dim += blockDim.x) {
    float weight = 0.0f, sum = 0.0f;
    for (int i = 0; i < num; ++i) {
      float fade = exp2f(part(i)[HEAD_DIM] - largest);
      weight += part(i)[HEAD_DIM + 1] * fade;
      sum += part(i)[dim] * fade;
    }
    out[(u64(token) * NUM_HEADS + head) * HEAD_DIM + dim] = to_half(sum / weight);
  }
}
KERNEL(combine)
#endif
