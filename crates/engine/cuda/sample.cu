// Sampling: a row of logits in, one token out, for requests that ask for no more than temperature, top-k, top-p and min-p.
//
// Nothing is sorted. Probabilities are whole numbers, so that sums are the same in every order: a token weighs
// exp((logit - best) / temperature) * 2^40, rounded down. Top-k and top-p find the logit down to which tokens stay digit by digit, from
// how many tokens, or how much weight, lie at each of 256 digits. Among equal logits the lower id comes first.

constexpr int SAMPLE_THREADS = 512;
constexpr float ONE = 1099511627776.0f;
constexpr int NUM_DIGITS = 256;
// What is written in place of a token.
constexpr int NOT_A_NUMBER = -1, NOTHING_POSSIBLE = -2;

// Orders as the numbers do.
__device__ __forceinline__ u32 key_of(float logit) {
  u32 bits = bits_of(logit == 0.0f ? 0.0f : logit);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The logit that has a key.
__device__ __forceinline__ float logit_of(u32 key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ u64 weight_of(float logit, float best, float temperature) {
  // Of infinite logits there may be several.
  return logit == best ? u64(ONE) : u64(expf((logit - best) / temperature) * ONE);
}

// Sums of all threads before this one, and of all threads.
__device__ __forceinline__ u64 sum_before(u64 x, u64& total) {
  __shared__ u64 sums[WARP_SIZE];
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  u64 sum = x;
#pragma unroll
  for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
    u64 below = __shfl_up_sync(FULL_WARP, sum, distance);
    if (lane >= distance) sum += below;
  }
  // Whoever reads the sums of the call before has to be through.
  __syncthreads();
  if (lane == WARP_SIZE - 1) sums[warp] = sum;
  __syncthreads();
  u64 before = 0;
  total = 0;
  for (int i = 0; i < SAMPLE_THREADS / WARP_SIZE; ++i) {
    if (i == warp) before = total;
    total += sums[i];
  }
  return before + sum - x;
}

// What stays of a row: keys above `key`, and of those that equal it the first `num_ties`.
struct Cut {
  u32 key;
  u64 num_ties;
};

// Amounts, of up to 2^42 each and of up to 2^18 tokens, are added up in three parts: only 32 bits are added to shared memory in one go.
constexpr int NUM_PARTS = 3, PART_BITS = 14;

// The cut at which the amounts of what stays, from the highest logit down, first reach `wanted`. Tokens below `least` are not looked at.
template <class Amount>
__device__ __forceinline__ Cut cut_at(const float* logits, int vocab_size, u32 least, u64 wanted, Amount amount_of) {
  __shared__ u32 amounts[NUM_PARTS][NUM_DIGITS];
  __shared__ u64 above;
  __shared__ u32 found;
  if (threadIdx.x == 0) above = 0, found = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < NUM_PARTS * NUM_DIGITS; i += SAMPLE_THREADS) amounts[i / NUM_DIGITS][i % NUM_DIGITS] = 0;
    __syncthreads();
    u32 prefix = found;
    for (int i = threadIdx.x; i < vocab_size; i += SAMPLE_THREADS) {
      u32 key = key_of(logits[i]);
      bool is_below_prefix = shift < 24 && key >> (shift + 8) != prefix >> (shift + 8);
      if (key < least || is_below_prefix) continue;
      u64 amount = amount_of(logits[i]);
#pragma unroll
      for (int part = 0; part < NUM_PARTS; ++part) {
        u32 bits = u32(amount >> part * PART_BITS) & ((1u << PART_BITS) - 1);
        if (bits != 0) atomicAdd(&amounts[part][key >> shift & (NUM_DIGITS - 1)], bits);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      auto amount_at = [&](int digit) {
        u64 amount = 0;
        for (int part = 0; part < NUM_PARTS; ++part) amount += u64(amounts[part][digit]) << part * PART_BITS;
        return amount;
      };
      int digit = NUM_DIGITS - 1;
      while (digit > 0 && above + amount_at(digit) < wanted) above += amount_at(digit--);
      found |= u32(digit) << shift;
    }
  }
  __syncthreads();
  return {found, wanted - above};
}

// Chooses a token for each row that is named. A block of SAMPLE_THREADS a row.
//
// An item is {row, top k or 0, temperature, top p, min p, draw, draw}: the numbers in the middle are the bits of floats, the draw is a
// fraction of 2^64, its low half first. A temperature of 0 takes the likeliest token. Tokens are written by the place of their items.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
sample(const float* logits, int vocab_size, const int* items, int* tokens) {
  __shared__ float best_logits[WARP_SIZE];
  __shared__ int best_tokens[WARP_SIZE];
  const int* item = items + 7 * blockIdx.x;
  int* token = tokens + blockIdx.x;
  const float* row = logits + u64(item[0]) * vocab_size;
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;

  // The likeliest token, and whether there is a NaN, which then takes its place.
  float best = minus_infinity();
  int best_token = NOTHING_POSSIBLE;
  auto take = [&](float other, int other_token) {
    bool is_better = other > best || (other == best && other_token >= 0 && u32(other_token) < u32(best_token));
    if (best_token == NOT_A_NUMBER || (!is_better && other_token != NOT_A_NUMBER)) return;
    best = other, best_token = other_token;
  };
  for (int i = threadIdx.x; i < vocab_size; i += SAMPLE_THREADS) {
    float logit = row[i];
    if (logit != logit) best_token = NOT_A_NUMBER;
    else if (logit > minus_infinity()) take(logit, i);
  }
#pragma unroll
  for (int mask = WARP_SIZE / 2; mask > 0; mask /= 2) {
    float other = __shfl_xor_sync(FULL_WARP, best, mask);
    int other_token = __shfl_xor_sync(FULL_WARP, best_token, mask);
    take(other, other_token);
  }
  if (lane == 0) best_logits[warp] = best, best_tokens[warp] = best_token;
  __syncthreads();
  for (int i = 0; i < SAMPLE_THREADS / WARP_SIZE; ++i) take(best_logits[i], best_tokens[i]);

  int top_k = item[1];
  float temperature = float_of(item[2]), top_p = float_of(item[3]), min_p = float_of(item[4]);
  if (temperature <= 0.0f || top_k == 1 || best_token < 0) {
    if (threadIdx.x == 0) *token = best_token;
    return;
  }
  Cut cut = {0, u64(vocab_size)};
  auto weight = [&](float logit) { return weight_of(logit, best, temperature); };
  if (top_k > 0 && top_k < vocab_size) cut = cut_at(row, vocab_size, 0, top_k, [](float) { return u64(1); });
  u64 least_weight = u64(min_p * ONE);

  // Each thread has a stretch of the row: what stays of it, ties in the order of the tokens.
  int stretch = (vocab_size + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
  int first = min(int(threadIdx.x) * stretch, vocab_size), end = min(first + stretch, vocab_size);
  auto weigh = [&](u64 least, u64& num_ties) {
    u64 ties = 0, total;
    for (int i = first; i < end; ++i) ties += key_of(row[i]) == cut.key;
    u64 before = sum_before(ties, total);
    num_ties = before < cut.num_ties ? min(ties, cut.num_ties - before) : 0;
    u64 sum = 0, left = num_ties;
    for (int i = first; i < end; ++i) {
      u32 key = key_of(row[i]);
      if (key < cut.key || (key == cut.key && left == 0)) continue;
      left -= key == cut.key;
      u64 w = weight(row[i]);
      sum += w >= least ? w : 0;
    }
    return sum;
  };
  u64 num_ties, total;
  if (top_p < 1.0f) {
    sum_before(weigh(0, num_ties), total);
    u64 wanted = max(u64(1), u64(ceil(double(top_p) * double(total))));
    Cut smaller = cut_at(row, vocab_size, cut.key, wanted, weight);
    // How many equal tokens are needed for the weight that is missing.
    u64 each = max(u64(1), weight(logit_of(smaller.key)));
    smaller.num_ties = (smaller.num_ties + each - 1) / each;
    if (smaller.key == cut.key) smaller.num_ties = min(smaller.num_ties, cut.num_ties);
    cut = smaller;
  }
  u64 mine = weigh(least_weight, num_ties);
  u64 before = sum_before(mine, total);
  u64 draw = u64(u32(item[5])) | u64(u32(item[6])) << 32;
  u64 target = high_product(total, draw);
  if (target < before || target >= before + mine) return;
  for (int i = first; i < end; ++i) {
    u32 key = key_of(row[i]);
    if (key < cut.key || (key == cut.key && num_ties == 0)) continue;
    num_ties -= key == cut.key;
    u64 w = weight(row[i]);
    if (w < least_weight) continue;
    before += w;
    if (target < before) {
      *token = i;
      return;
    }
  }
}
KERNEL(sample)
