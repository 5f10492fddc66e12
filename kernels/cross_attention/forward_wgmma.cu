// Cross-modal attention on Hopper (sm_90a): out = γ softmax(QᵀK) V + residual, for 32-wide queries and keys and
// 256-wide values of 16 bits, the logits never stored.
//
// A block takes 128 queries. One warpgroup fetches tiles of 64 keys and values into a ring of shared memory; two
// more each keep 64 queries × 256 channels of the result in registers. While the tensor cores multiply the weights
// of one tile by its values, the same warps take the exponentials of the next:
//
//   tensor cores    S(j+1) = Q K(j+1)    O += P(j) V(j)
//   other units                          P(j+1) = exp2(S(j+1) - maximum)
//
// With few queries, 2, 4 or 8 neighbouring blocks share them, each with its part of the keys. Each leaves its own mean of
// the values, maximum and sum in a workspace, waits until all have, and blends its share of the channels: one launch.
// Blocks start in the order of their numbers and there are no more than multiprocessors, so none waits for a block that
// could not start. (A cooperative launch would promise it, but took 70 µs longer inside a CUDA graph.)
#include "hopper.cuh"

constexpr int HEAD = 32;
constexpr int CHANNELS = 256;
constexpr int QUERIES = 128;  // of a block
constexpr int KEYS = 64;      // of a tile
constexpr int STAGES = 5;     // of the ring
constexpr int CONSUMERS = 256;

constexpr int VALUE_BYTES = CHANNELS * KEYS * 2;
constexpr int KEY_BYTES = HEAD * KEYS * 2;
constexpr int STAGE_BYTES = VALUE_BYTES + KEY_BYTES;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -1e38f;  // a maximum to begin with; times LOG2_E it is still finite
// The maximum in use may lag behind the true one by this much, in powers of two: P stays below 2^8 and the sums are
// in float, so the quotient is as exact; the result in registers is hardly ever rescaled.
constexpr float SLACK = 8.f;

// Shared memory, in bytes from its start. The result in float takes the place of the ring at the end, in rows of
// channels (nhwc) or of queries (nchw), padded so that a warp's writes fall into different banks.
constexpr int CHANNEL_ROW = CHANNELS + 8;
constexpr int QUERY_ROW = QUERIES + 4;
constexpr int BARRIERS = STAGES * STAGE_BYTES;
constexpr int SHARED_BYTES = BARRIERS + 2 * STAGES * 8;
static_assert(QUERIES * CHANNEL_ROW * 4 <= BARRIERS && CHANNELS * QUERY_ROW * 4 <= BARRIERS, "the result must fit");
static_assert(SHARED_BYTES <= 227 * 1024, "shared memory of a block");

// Registers: what the fetching warpgroup gives up, the other two take; a block starts with 168 for each thread.
constexpr int FETCHING = 72, MULTIPLYING = 216;
static_assert(FETCHING + 2 * MULTIPLYING <= 3 * 168, "the multiplying warps would wait for registers for ever");

// One tile of keys and values on its way to a stage of the ring, or a warp's share of it where several WARPS do it
// together, swizzled as matrix_descriptor says; zeros past M, which WHOLE promises not to reach.
template <class T, bool NHWC, bool WHOLE, int WARPS>
__device__ __forceinline__ void fetch(unsigned char* values, const T* key, const T* value, int first, int M, int warp) {
  int lane = threadIdx.x % 32;
  unsigned char* keys = values + VALUE_BYTES;
  if constexpr (NHWC) {
    // Values: a row is 64 channels of one key, four blocks of 64 rows. Keys: a row is one key's 32 channels.
    int skip = warp * (KEYS / WARPS);
    first += skip;
    const T* from = value + (long long)first * CHANNELS + lane * 8;
    unsigned char* to = values + lane / 8 * (KEYS * 128) + skip * 128;
#pragma unroll(WHOLE ? 8 : 2)
    for (int row = 0; row < KEYS / WARPS; row++) {
      bool valid = WHOLE || first + row < M;
      cp_async<16>(to + row * 128 + (lane % 8 * 16 ^ row % 8 * 16), valid ? from + row * CHANNELS : value, valid);
    }
    from = key + (long long)(first + lane / 4) * HEAD + lane % 4 * 8;
    to = keys + (skip + lane / 4) * 64 + (lane % 4 ^ lane / 8) * 16;
#pragma unroll
    for (int row = 0; row < KEYS / WARPS; row += 8) {
      bool valid = WHOLE || first + lane / 4 + row < M;
      cp_async<16>(to + row * 64, valid ? from + row * HEAD : key, valid);
    }
  } else {
    // Values: a row is 64 keys of one channel. Keys: a row is 64 keys of one of the 32 channels.
    bool valid = WHOLE || first + lane % 8 * 8 < M;
    long long step = valid ? 4ll * M : 0, column = first + lane % 8 * 8;
    int even = (lane % 8 ^ lane / 8) * 16, odd = (lane % 8 ^ (lane / 8 + 4)) * 16;
    int top = warp * (CHANNELS / WARPS) + lane / 8;
    const T* from = valid ? value + (long long)top * M + column : value;
#pragma unroll(WHOLE ? 8 : 2)
    for (int row = 0; row < CHANNELS / WARPS; row += 4, from += step) {
      cp_async<16>(values + (top + row) * 128 + (row % 8 ? odd : even), from, valid);
    }
    top = warp * (HEAD / WARPS) + lane / 8;
    from = valid ? key + (long long)top * M + column : key;
#pragma unroll
    for (int row = 0; row < HEAD / WARPS; row += 4, from += step) {
      cp_async<16>(keys + (top + row) * 128 + (row % 8 ? odd : even), from, valid);
    }
  }
}

// S = Q K of one tile: queries in registers, keys in shared memory at `keys`.
template <class T, bool NHWC>
__device__ __forceinline__ void logits(float (&S)[KEYS / 2], const unsigned (&Q)[HEAD / 16][4], unsigned keys) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD / 16; step++) {
    unsigned long long b = NHWC ? matrix_descriptor<64>(keys + step * 32, 16, 512)
                                : matrix_descriptor<128>(keys + step * 2048, 16, 1024);
    wgmma_64x64x16<T, NHWC ? 0 : 1>(S, Q[step], b, step > 0);
  }
  wgmma_commit();
}

// O += P V of one tile.
template <class T, bool NHWC>
__device__ __forceinline__ void weigh(float (&O)[CHANNELS / 2], const unsigned (&P)[KEYS / 16][4], unsigned values,
                                      bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    unsigned long long b = NHWC ? matrix_descriptor<128>(values + step * 2048, KEYS * 128, 1024)
                                : matrix_descriptor<128>(values + step * 32, 16, 1024);
    wgmma_64x256x16<T, NHWC ? 1 : 0>(O, P[step], b, accumulate || step > 0);
  }
  wgmma_commit();
}

// What a thread knows of its two rows of queries, 8 apart: maximum in use, and its share of the sum of weights.
struct Rows {
  float maximum[2], sum[2];
  bool huge;  // a maximum of its warp, beyond which its product with log2 e is too coarse to subtract
};
constexpr float LARGE = 1e6f;

// S becomes exp2((S - maximum) log2 e). Returns whether the maximum moved; then the results so far shrink by `factor`.
__device__ __forceinline__ bool soften(float (&S)[KEYS / 2], Rows& rows, float (&factor)[2], int first, int M) {
  int lane = threadIdx.x % 32;
  if (first + KEYS > M) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      int column = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (column >= M) S[i] = __int_as_float(0xff800000);
    }
  }
  float highest[2] = {LOWEST, LOWEST};
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], S[i]);
  bool moved = false;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    highest[row] = fmaxf(highest[row], __shfl_xor_sync(~0u, highest[row], 1));
    highest[row] = fmaxf(highest[row], __shfl_xor_sync(~0u, highest[row], 2));
    moved |= (highest[row] - rows.maximum[row]) * LOG2_E > SLACK;
  }
  moved = __any_sync(~0u, moved);
  if (moved) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float next = fmaxf(rows.maximum[row], highest[row]);
      factor[row] = exp2_fast((rows.maximum[row] - next) * LOG2_E);
      rows.maximum[row] = next;
      rows.sum[row] *= factor[row];
    }
    rows.huge = __any_sync(~0u, fmaxf(fabsf(rows.maximum[0]), fabsf(rows.maximum[1])) > LARGE);
  }
  if (rows.huge) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) S[i] = exp2_fast((S[i] - rows.maximum[i / 2 % 2]) * LOG2_E);
  } else {
    float offset[2] = {rows.maximum[0] * LOG2_E, rows.maximum[1] * LOG2_E};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) S[i] = exp2_fast(fmaf(S[i], LOG2_E, -offset[i / 2 % 2]));
  }
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) rows.sum[i / 2 % 2] += S[i];
  return moved;
}

// The weights as operands of the next product: what lies in a thread's registers is already where they must be.
template <class T> __device__ __forceinline__ void as_operand(unsigned (&P)[KEYS / 16][4], const float (&S)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; i++) P[i / 4][i % 4] = pack<T>(S[2 * i], S[2 * i + 1]);
}

// The queries of a warp as operands, zeros past N.
template <class T, bool NHWC>
__device__ __forceinline__ void load_queries(unsigned (&Q)[HEAD / 16][4], const T* query, int row, int N) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < HEAD / 4; i++) {
    int place = row + i % 2 * 8, channel = i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
    unsigned pair = 0;
    if (place < N) {
      if constexpr (NHWC) {
        pair = *(const unsigned*)(query + (long long)place * HEAD + channel);
      } else {
        const T* at = query + (long long)channel * N + place;
        pair = at[0].bits | (unsigned)at[N].bits << 16;
      }
    }
    Q[i / 4][i % 4] = pair;
  }
}

// Where results go, of one image.
template <class T> struct Results {
  const T* residual;   // [256, N]
  float gamma;
  T* out;              // [256, N]
  float* log_sum_exp;  // [N] or null
  T* attended;         // [256, N] or null
  // Of these queries, for blocks that share them:
  uint4* parts;      // [splits, 16, 256]: of each thread, two columns of 8 channels at a time, as its registers hold them
  float2* scales;    // [splits, 128], the maximum of each part and its sum of weights
  unsigned* ticket;  // zero before and after
};

template <class T> __device__ __forceinline__ uint4 pack_8(const float (&values)[8]) {
  return make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
                    pack<T>(values[6], values[7]));
}
template <class T> __device__ __forceinline__ void unpack_8(float (&values)[8], uint4 packed) {
  unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) values[2 * i] = low_half<T>(words[i]), values[2 * i + 1] = high_half<T>(words[i]);
}

// Until all `splits` blocks have come here, and what they wrote before can be read. The ticket counts those that came,
// then those that leave; the last to leave sets it back.
__device__ __forceinline__ void meet(unsigned* ticket, unsigned splits, int thread) {
  named_barrier(1, CONSUMERS);
  if (thread == 0) {
    count_up(ticket);
    wait_for_count(ticket, splits);
    if (count_up(ticket) == 2 * splits - 1) *ticket = 0;
  }
  named_barrier(1, CONSUMERS);
}

// Each block's part of the keys to its share of the channels: A[i] of the share from the results O of all parts.
template <class T, int SPLITS>
__device__ __forceinline__ void blend(float (&A)[16 / SPLITS][8], Rows& rows, const float (&O)[CHANNELS / 2],
                                      const Results<T>& results, int row, int thread) {
  constexpr int SHARE = 16 / SPLITS;
  int split = blockIdx.x;
  float weight[2];
#pragma unroll
  for (int half = 0; half < 2; half++) weight[half] = rows.sum[half] == 0.f ? 0.f : 1.f / rows.sum[half];  // no keys: 0
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float part[8];
#pragma unroll
    for (int j = 0; j < 8; j++) part[j] = O[8 * i + j] * weight[j / 2 % 2];
    results.parts[(split * 16 + i) * CONSUMERS + thread] = pack_8<T>(part);
  }
  if (thread % 4 == 0) {
    results.scales[split * QUERIES + row] = make_float2(rows.maximum[0], rows.sum[0]);
    results.scales[split * QUERIES + row + 8] = make_float2(rows.maximum[1], rows.sum[1]);
  }
  meet(results.ticket, SPLITS, thread);

  uint4 packed[SPLITS][SHARE];
  float2 scale[SPLITS][2];
#pragma unroll
  for (int part = 0; part < SPLITS; part++) {
    scale[part][0] = results.scales[part * QUERIES + row];
    scale[part][1] = results.scales[part * QUERIES + row + 8];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
      packed[part][i] = results.parts[(part * 16 + split * SHARE + i) * CONSUMERS + thread];
    }
  }
  float factor[SPLITS][2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float highest = LOWEST, sum = 0.f;
#pragma unroll
    for (int part = 0; part < SPLITS; part++) highest = fmaxf(highest, scale[part][half].x);
#pragma unroll
    for (int part = 0; part < SPLITS; part++) {
      factor[part][half] = exp2_fast((scale[part][half].x - highest) * LOG2_E) * scale[part][half].y;
      sum += factor[part][half];
    }
    float weight = 1.f / sum;
#pragma unroll
    for (int part = 0; part < SPLITS; part++) factor[part][half] *= weight;
    rows.maximum[half] = highest;
    rows.sum[half] = sum;
  }
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) A[i][j] = 0.f;
#pragma unroll
    for (int part = 0; part < SPLITS; part++) {
      float values[8];
      unpack_8<T>(values, packed[part][i]);
#pragma unroll
      for (int j = 0; j < 8; j++) A[i][j] = fmaf(values[j], factor[part][j / 2 % 2], A[i][j]);
    }
  }
}

// From a thread's results to what the kernel returns. They pass through shared memory, where the ring was, so that
// neighbouring threads hold what are neighbours in device memory. `row` is the thread's first of two, 8 apart.
template <class T, bool NHWC, int SPLITS>
__device__ __forceinline__ void finish(float* shared, float (&O)[CHANNELS / 2], Rows& rows,
                                       const Results<T>& results, int first_query, int row, int thread, int N) {
  constexpr int SHARE = 16 / SPLITS, WIDTH = CHANNELS / SPLITS;  // of this block: column pairs, channels
  int first_channel = SPLITS > 1 ? blockIdx.x * WIDTH : 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    rows.sum[half] += __shfl_xor_sync(~0u, rows.sum[half], 1);
    rows.sum[half] += __shfl_xor_sync(~0u, rows.sum[half], 2);
  }
  float A[SHARE][8];
  if constexpr (SPLITS > 1) {
    blend<T, SPLITS>(A, rows, O, results, row, thread);
  } else {
    float weight[2] = {1.f / rows.sum[0], 1.f / rows.sum[1]};
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) A[i / 8][i % 8] = O[i] * weight[i / 2 % 2];
  }
  if (results.log_sum_exp != nullptr && first_channel == 0 && thread % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int query = first_query + row + half * 8;
      if (query < N) results.log_sum_exp[query] = rows.maximum[half] + logf(rows.sum[half]);
    }
  }

  named_barrier(1, CONSUMERS);  // both warpgroups are through with the ring
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      int query = row + j / 2 % 2 * 8, channel = i * 16 + j / 4 * 8 + thread % 4 * 2;
      if constexpr (NHWC) {
        *(float2*)(shared + query * CHANNEL_ROW + channel) = make_float2(A[i][j], A[i][j + 1]);
      } else {
        shared[channel * QUERY_ROW + query] = A[i][j];
        shared[(channel + 1) * QUERY_ROW + query] = A[i][j + 1];
      }
    }
  }
  named_barrier(1, CONSUMERS);

  // Eight neighbours at a time: channels of one query (nhwc) or queries of one channel (nchw). They go in groups whose
  // residuals are all asked for before the first is used.
  constexpr int PIECES = QUERIES * WIDTH / 8 / CONSUMERS, GROUP = PIECES < 8 ? PIECES : 8;
#pragma unroll 1
  for (int start = 0; start < PIECES; start += GROUP) {
    uint4 residual[GROUP];
    long long at[GROUP];
    const float* from[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      int piece = (start + i) * CONSUMERS + thread;
      int query = NHWC ? piece / (WIDTH / 8) : piece % (QUERIES / 8) * 8;
      int channel = NHWC ? piece % (WIDTH / 8) * 8 : piece / (QUERIES / 8);
      from[i] = shared + (NHWC ? query * CHANNEL_ROW + channel : channel * QUERY_ROW + query);
      query += first_query, channel += first_channel;
      at[i] = query >= N ? -1 : NHWC ? (long long)query * CHANNELS + channel : (long long)channel * N + query;
      residual[i] = *(const uint4*)(results.residual + (at[i] < 0 ? 0 : at[i]));
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      if (at[i] < 0) continue;
      float4 low = *(const float4*)from[i], high = *(const float4*)(from[i] + 4);
      float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, sums[8];
      if (results.attended != nullptr) *(uint4*)(results.attended + at[i]) = pack_8<T>(values);
      unpack_8<T>(sums, residual[i]);
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j] = fmaf(results.gamma, values[j], sums[j]);
      *(uint4*)(results.out + at[i]) = pack_8<T>(sums);
    }
  }
}

template <class T, bool NHWC>
__device__ __forceinline__ void consume(unsigned char* shared, Barrier* full, Barrier* empty, const T* query,
                                        const Results<T>& results, int N, int M, int begin, int end) {
  int thread = threadIdx.x - 128, lane = thread % 32;
  int first_query = blockIdx.y * QUERIES, row = thread / 32 * 16 + lane / 4;
  unsigned ring = shared_address(shared);
  unsigned Q[HEAD / 16][4], P[KEYS / 16][4];
  float S[KEYS / 2], O[CHANNELS / 2], factor[2] = {1.f, 1.f};
  Rows rows = {{LOWEST, LOWEST}, {0.f, 0.f}, false};
  load_queries<T, NHWC>(Q, query, first_query + row, N);
#pragma unroll
  for (int i = 0; i < CHANNELS / 2; i++) O[i] = 0.f;

  if (begin < end) {
    barrier_wait(&full[0], 0);
    logits<T, NHWC>(S, Q, ring + VALUE_BYTES);
    wgmma_wait<0>();
    soften(S, rows, factor, begin * KEYS, M);
    as_operand<T>(P, S);
    int stage = 0, phase = 0;
#pragma unroll 1
    for (int tile = begin; tile < end - 1; tile++) {
      int next = stage + 1 == STAGES ? 0 : stage + 1, next_phase = next ? phase : phase ^ 1;
      barrier_wait(&full[next], next_phase);
      logits<T, NHWC>(S, Q, ring + next * STAGE_BYTES + VALUE_BYTES);
      weigh<T, NHWC>(O, P, ring + stage * STAGE_BYTES, true);
      wgmma_wait<1>();
      bool moved = soften(S, rows, factor, (tile + 1) * KEYS, M);
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(&empty[stage]);
      if (moved) {
#pragma unroll
        for (int i = 0; i < CHANNELS / 2; i++) O[i] *= factor[i / 2 % 2];
      }
      as_operand<T>(P, S);
      stage = next, phase = next_phase;
    }
    weigh<T, NHWC>(O, P, ring + stage * STAGE_BYTES, true);
    wgmma_wait<0>();
  }

  float* result = (float*)shared;
  switch (gridDim.x) {
    case 1: return finish<T, NHWC, 1>(result, O, rows, results, first_query, row, thread, N);
    case 2: return finish<T, NHWC, 2>(result, O, rows, results, first_query, row, thread, N);
    case 4: return finish<T, NHWC, 4>(result, O, rows, results, first_query, row, thread, N);
    case 8: return finish<T, NHWC, 8>(result, O, rows, results, first_query, row, thread, N);
  }
}

// The four warps fetch the first tile together, which all wait for; then each every fourth tile by itself, so that one
// that waits for room in the ring holds up no other.
template <class T, bool NHWC>
__device__ __forceinline__ void produce(unsigned char* shared, Barrier* full, Barrier* empty, const T* key,
                                        const T* value, int M, int begin, int end) {
  if (begin == end) return;
  int warp = threadIdx.x / 32;
  fetch<T, NHWC, false, 4>(shared, key, value, begin * KEYS, M, warp);
  cp_async_commit();
#pragma unroll 1
  for (int tile = begin + 1 + warp, first = 1; first || tile < end; tile += 4, first = 0) {
    int turn = (tile - begin) / STAGES, stage = (tile - begin) % STAGES;
    if (tile < end) {
      barrier_wait(&empty[stage], turn % 2 ^ 1);
      unsigned char* to = shared + stage * STAGE_BYTES;
      if ((tile + 1) * KEYS <= M) {
        fetch<T, NHWC, true, 1>(to, key, value, tile * KEYS, M, 0);
      } else {
        fetch<T, NHWC, false, 1>(to, key, value, tile * KEYS, M, 0);
      }
    }
    cp_async_commit();
    if (first) {
      cp_async_wait<1>();
      fence_shared_for_wgmma();
      __syncwarp();
      if (threadIdx.x % 4 == 0) barrier_arrive(&full[0]);
    }
    cp_async_wait<0>();
    fence_shared_for_wgmma();
    if (tile < end) barrier_arrive(&full[stage]);
  }
}

template <class T, bool NHWC>
__device__ __forceinline__ void attend(const T* query, const T* key, const T* value, const T* residual,
                                       const float* gamma, T* out, float* log_sum_exp, T* attended, T* workspace,
                                       unsigned* tickets, int N, int M) {
  unsigned char* shared = dynamic_shared();
  Barrier* full = (Barrier*)(shared + BARRIERS);
  Barrier* empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(&full[stage], 32);
      barrier_init(&empty[stage], CONSUMERS / 32);
    }
  }
  __syncthreads();
  int splits = gridDim.x, batch = blockIdx.z;
  int tiles = (M + KEYS - 1) / KEYS, part = (tiles + splits - 1) / splits;
  int begin = min((int)blockIdx.x * part, tiles), end = min(begin + part, tiles);
  if (threadIdx.x < 128) {
    registers_down<FETCHING>();
    produce<T, NHWC>(shared, full, empty, key + (long long)batch * M * HEAD, value + (long long)batch * M * CHANNELS, M,
                     begin, end);
  } else {
    registers_up<MULTIPLYING>();
    long long image = (long long)batch * N * CHANNELS, block = (long long)batch * gridDim.y + blockIdx.y;
    float2* scales = (float2*)(workspace + (long long)gridDim.z * gridDim.y * splits * (QUERIES * CHANNELS));
    Results<T> results = {residual + image,
                          *gamma,
                          out + image,
                          log_sum_exp == nullptr ? nullptr : log_sum_exp + (long long)batch * N,
                          attended == nullptr ? nullptr : attended + image,
                          (uint4*)(workspace + block * splits * (QUERIES * CHANNELS)),
                          scales + block * splits * QUERIES,
                          tickets + block};
    consume<T, NHWC>(shared, full, empty, query + (long long)batch * N * HEAD, results, N, M, begin, end);
  }
}

// Grid (splits, ⌈N / 128⌉, B) with 1, 2, 4 or 8 splits, 384 threads, SHARED_BYTES of dynamic shared memory; no
// more blocks than multiprocessors where splits > 1. All pointers to T are aligned to 16 bytes; in nchw N and M are multiples of 8.
#define KERNEL(NAME, T, NHWC)                                                                                  \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                         \
      NAME(const T* query,     /* [B, 32, N] */                                                                \
           const T* key,       /* [B, 32, M] */                                                                \
           const T* value,     /* [B, 256, M] */                                                               \
           const T* residual,  /* [B, 256, N] */                                                               \
           const float* gamma, /* [1] */                                                                       \
           T* out,             /* [B, 256, N] */                                                               \
           float* log_sum_exp, /* [B, N] or null */                                                            \
           T* attended,        /* [B, 256, N] or null */                                                       \
           T* workspace,       /* [B, ⌈N / 128⌉, splits, 128 × 256], then float2 [B, ⌈N / 128⌉, splits, 128] */ \
           unsigned* tickets,  /* [B, ⌈N / 128⌉], zero before and after; both null where splits is 1 */       \
           int N, int M) {                                                                                     \
    wait_for_earlier();                                                                                          \
    attend<T, NHWC>(query, key, value, residual, gamma, out, log_sum_exp, attended, workspace, tickets, N, M);    \
  }

KERNEL(cross_attention_wgmma_f16_nchw, f16, false)
KERNEL(cross_attention_wgmma_f16_nhwc, f16, true)
KERNEL(cross_attention_wgmma_bf16_nchw, bf16, false)
KERNEL(cross_attention_wgmma_bf16_nhwc, bf16, true)
