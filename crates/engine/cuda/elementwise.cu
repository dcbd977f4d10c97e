// Embedding, norms, angles, rotation with the KV write, gates, soft caps.

// residual (num_tokens, HIDDEN_SIZE) = embedding of each token * scale. A block a token.
extern "C" __global__ void embed(const int* tokens, const half_t* embedding, float scale, float* residual) {
  const half8* from = reinterpret_cast<const half8*>(embedding + u64(tokens[blockIdx.x]) * HIDDEN_SIZE);
  float4* to = reinterpret_cast<float4*>(residual + u64(blockIdx.x) * HIDDEN_SIZE);
  for (int i = threadIdx.x; i < HIDDEN_SIZE / 8; i += blockDim.x) {
    half8 x = from[i];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const half_t* y = x.x + 4 * part;
      to[2 * i + part] = {to_float(y[0]) * scale, to_float(y[1]) * scale, to_float(y[2]) * scale, to_float(y[3]) * scale};
    }
  }
}
KERNEL(embed)

constexpr int NORM_THREADS = 256;

// residual += norm(delta + bias); out = norm(residual). A block of NORM_THREADS a row of `out`.
//
// Without `delta` nothing is added, without `delta_weight` it is added as it is, `bias` may be missing. Where `rows` says which
// rows of residual and delta are wanted, the residual stays as it was: nobody reads it again.
// Norms: x / sqrt(mean(x^2) + eps) * weight, in f32.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm(float* residual, const half_t* delta, const float* bias, const float* delta_weight, const float* weight, const int* rows,
         half_t* out, float eps) {
  constexpr int NUM = (HIDDEN_SIZE / 4 + NORM_THREADS - 1) / NORM_THREADS;
  u64 row = rows ? rows[blockIdx.x] : int(blockIdx.x);
  float4* residual_row = reinterpret_cast<float4*>(residual + row * HIDDEN_SIZE);
  float4 x[NUM];
  float squares = 0.0f;
#pragma unroll
  for (int n = 0; n < NUM; ++n) {
    int i = n * NORM_THREADS + threadIdx.x;
    x[n] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i >= HIDDEN_SIZE / 4) continue;
    if (delta) {
      uint2 packed = reinterpret_cast<const uint2*>(delta + row * HIDDEN_SIZE)[i];
      x[n] = {to_float({u16(packed.x)}), to_float({u16(packed.x >> 16)}), to_float({u16(packed.y)}), to_float({u16(packed.y >> 16)})};
      if (bias) {
        float4 b = reinterpret_cast<const float4*>(bias)[i];
        x[n] = {x[n].x + b.x, x[n].y + b.y, x[n].z + b.z, x[n].w + b.w};
      }
      squares += x[n].x * x[n].x + x[n].y * x[n].y + x[n].z * x[n].z + x[n].w * x[n].w;
    }
  }
  // The same for all threads of a block.
  float scale = 1.0f;
  if (delta_weight) scale = rsqrtf(sum_of_block(squares) / HIDDEN_SIZE + eps);
  squares = 0.0f;
#pragma unroll
  for (int n = 0; n < NUM; ++n) {
    int i = n * NORM_THREADS + threadIdx.x;
    if (i >= HIDDEN_SIZE / 4) continue;
    if (delta_weight) {
      float4 w = reinterpret_cast<const float4*>(delta_weight)[i];
      x[n] = {x[n].x * scale * w.x, x[n].y * scale * w.y, x[n].z * scale * w.z, x[n].w * scale * w.w};
    }
    float4 r = residual_row[i];
    x[n] = {x[n].x + r.x, x[n].y + r.y, x[n].z + r.z, x[n].w + r.w};
    if (delta && !rows) residual_row[i] = x[n];
    squares += x[n].x * x[n].x + x[n].y * x[n].y + x[n].z * x[n].z + x[n].w * x[n].w;
  }
  scale = rsqrtf(sum_of_block(squares) / HIDDEN_SIZE + eps);
#pragma unroll
  for (int n = 0; n < NUM; ++n) {
    int i = n * NORM_THREADS + threadIdx.x;
    if (i >= HIDDEN_SIZE / 4) continue;
    float4 w = reinterpret_cast<const float4*>(weight)[i];
    uint2 packed = {pack(x[n].x * scale * w.x, x[n].y * scale * w.y), pack(x[n].z * scale * w.z, x[n].w * scale * w.w)};
    reinterpret_cast<uint2*>(out + u64(blockIdx.x) * HIDDEN_SIZE)[i] = packed;
  }
}
KERNEL(rms_norm)

// angles (num_tokens, half) = cosine and sine of position * frequency, both times `scale`. A block a token.
//
// Frequencies are (2, half): the second row for tokens of long sequences.
extern "C" __global__ void rope_angles(const int* positions, const int* is_long, const float* frequencies, float scale,
                                       int half, float2* angles) {
  int token = blockIdx.x;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    float sine, cosine;
    // Rounded to f32 as the reference does.
    sincosf(float(positions[token]) * frequencies[is_long[token] * half + i], &sine, &cosine);
    angles[u64(token) * half + i] = {cosine * scale, sine * scale};
  }
}
KERNEL(rope_angles)

constexpr int ROPE_WARPS = 4;

// Adds biases to queries, keys and values, norms queries and keys head by head where there are weights for it, rotates them,
// and writes keys and values to the cache. Queries stay in `qkv` (num_tokens, (NUM_HEADS + 2 NUM_KV_HEADS) * HEAD_DIM).
//
// A warp a head of a token: grid (num_tokens, heads / ROPE_WARPS), blocks of ROPE_WARPS warps. `slots` says where in the cache
// a token lives: block * BLOCK_SIZE + offset. Caches are (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM).
extern "C" __global__ void __launch_bounds__(ROPE_WARPS * WARP_SIZE)
rotate_and_store(half_t* qkv, const float* bias, const float* query_weight, const float* key_weight, const float2* angles,
                 int half, const int* slots, half_t* keys, half_t* values, float eps) {
  constexpr int NUM_ALL = NUM_HEADS + 2 * NUM_KV_HEADS;
  __shared__ float staged[ROPE_WARPS][HEAD_DIM];
  int token = blockIdx.x, warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  int head = blockIdx.y * ROPE_WARPS + warp;
  if (head >= NUM_ALL) return;
  half_t* projected = qkv + (u64(token) * NUM_ALL + head) * HEAD_DIM;
  float* x = staged[warp];
  float squares = 0.0f;
  for (int i = lane; i < HEAD_DIM; i += WARP_SIZE) {
    float y = to_float(projected[i]) + (bias ? bias[head * HEAD_DIM + i] : 0.0f);
    x[i] = y;
    squares += y * y;
  }
  bool is_query = head < NUM_HEADS, is_value = head >= NUM_HEADS + NUM_KV_HEADS;
  const float* weight = is_value ? nullptr : is_query ? query_weight : key_weight;
  if (weight) {
    float scale = rsqrtf(sum_of_warp(squares) / HEAD_DIM + eps);
    for (int i = lane; i < HEAD_DIM; i += WARP_SIZE) x[i] *= scale * weight[i];
  }
  __syncwarp();
  half_t* to = projected;
  if (!is_query) {
    int slot = slots[token], kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
    u64 row = (u64(slot / BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
    to = (is_value ? values : keys) + row * HEAD_DIM;
  }
  for (int i = lane; i < HEAD_DIM; i += WARP_SIZE) {
    float y = x[i];
    if (!is_value && i < 2 * half) {
      bool is_first = i < half;
      float2 angle = angles[u64(token) * half + (is_first ? i : i - half)];
      y = is_first ? y * angle.x - x[i + half] * angle.y : y * angle.x + x[i - half] * angle.y;
    }
    to[i] = to_half(y);
  }
}
KERNEL(rotate_and_store)

// ACTIVATION is the place in config.rs's `Activation`.
__device__ __forceinline__ float activate(float x) {
  switch (ACTIVATION) {
    case 0: return x / (1.0f + expf(-x));
    case 1: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 2: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 3: return x / (1.0f + expf(-1.702f * x));
    default: return fmaxf(x, 0.0f);
  }
}

// out (num_tokens, width) = activation(gates + bias) * (ups + bias) of gate_up (num_tokens, 2 width). Grid (num_tokens, any).
extern "C" __global__ void gate(const half_t* gate_up, const float* bias, int width, half_t* out) {
  const half8* gates = reinterpret_cast<const half8*>(gate_up + u64(blockIdx.x) * 2 * width);
  const half8* ups = gates + width / 8;
  half8* to = reinterpret_cast<half8*>(out + u64(blockIdx.x) * width);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width / 8; i += gridDim.y * blockDim.x) {
    half8 gate = gates[i], up = ups[i], y;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float g = to_float(gate.x[j]), u = to_float(up.x[j]);
      if (bias) g += bias[8 * i + j], u += bias[width + 8 * i + j];
      y.x[j] = to_half(activate(g) * u);
    }
    to[i] = y;
  }
}
KERNEL(gate)

// x = cap * tanh(x / cap) of `num` numbers.
extern "C" __global__ void softcap(float* x, float cap, int num) {
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < u64(num); i += gridDim.x * blockDim.x) x[i] = cap * tanhf(x[i] / cap);
}
KERNEL(softcap)
