// out = gamma · softmax(QᵀK)·V + residual in float arithmetic, for float tensors and for 16-bit ones on devices whose
// tensor cores do not know their type: one pass over the keys, no logits stored.
//
// A block is eight warps of 8 queries each. It walks over its share of the keys in tiles of KEYS. The 8 × KEYS logits
// of a warp are four to a thread; as weights they pass through shared memory to the product with the values, of which
// a thread makes 8 queries × CHANNELS / 32 channels in registers. Whatever a warp exchanges, only its own lanes read.
// A block makes one chunk of CHANNELS channels; other chunks are other blocks, and where there are few queries, so are
// other shares of the keys.
#include "online_softmax.cuh"

#ifndef HEAD
#define HEAD 32  // features of query and key in shared memory at a time: 8, 16, 32 or 64; more take several goes
#endif
#ifndef CHANNELS
#define CHANNELS 256  // of a chunk: 32, 64, 128 or 256
#endif

constexpr int WARPS = 8, ROWS = 8, QUERIES = ROWS * WARPS, THREADS = 32 * WARPS;
constexpr int KEYS = 16;

// Tiles lie in shared memory in lines of LENGTH floats, with four floats between them: reading four floats of each of 8
// successive lines, the threads meet no bank twice.
template <int LENGTH> constexpr int PITCH = LENGTH + 4;

// Copies a tile whose element i of a line lies at source[line · pitch + i], or ACROSS: source[i · pitch + line]; zeros
// outside of `lines` × `length`. At each step the block takes WIDTH neighbours of HEIGHT rows of memory. Across, a warp
// takes 8 neighbours of 4 rows, so that it writes to all banks.
template <int LINES, int LENGTH, bool ACROSS, class T>
__device__ __forceinline__ void load(float* tile, const T* source, int lines, int length, int pitch) {
  constexpr int COLUMNS = ACROSS ? LINES : LENGTH, ROWS_OF_TILE = ACROSS ? LENGTH : LINES;  // of memory
  constexpr int WIDTH = COLUMNS < 64 ? COLUMNS : 64, HEIGHT = THREADS / WIDTH;
  constexpr int RIGHT = ACROSS ? PITCH<LENGTH> : 1, DOWN = ACROSS ? 1 : PITCH<LENGTH>;  // in the tile
  static_assert(THREADS % WIDTH == 0 && COLUMNS % WIDTH == 0, "powers of two");
  int columns = ACROSS ? lines : length, rows = ACROSS ? length : lines;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int column = ACROSS ? warp % (WIDTH / 8) * 8 + lane % 8 : threadIdx.x % WIDTH;
  int row = ACROSS ? warp / (WIDTH / 8) * 4 + lane / 8 : threadIdx.x / WIDTH;
#pragma unroll
  for (int left = 0; left < COLUMNS; left += WIDTH) {
    const T* from = source + (long long)row * pitch + left + column;
    float* to = tile + (left + column) * RIGHT + row * DOWN;
#pragma unroll 4
    for (int top = 0; top < ROWS_OF_TILE; top += HEIGHT, from += (long long)HEIGHT * pitch, to += HEIGHT * DOWN) {
      if (top + row >= ROWS_OF_TILE) break;
      *to = top + row < rows && left + column < columns ? to_float(*from) : 0;
    }
  }
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <class T, bool NHWC>
__device__ __forceinline__ void attend(const T* query, const T* key, const T* value, const T* residual,
                                       const float* gamma, T* out, T* attended, float* log_sum_exp, float* workspace,
                                       unsigned* arrived, int D, int C, int N, int M, int chunks, int tiles_a_share) {
  float* query_tile = (float*)dynamic_shared();               // [QUERIES][HEAD]
  float* key_tile = query_tile + QUERIES * PITCH<HEAD>;       // [KEYS][HEAD]
  float* value_tile = key_tile + KEYS * PITCH<HEAD>;          // [CHANNELS][KEYS]
  float* weight_tile = value_tile + CHANNELS * PITCH<KEYS>;   // [QUERIES][KEYS]

  int query_tiles = (N + QUERIES - 1) / QUERIES, batch = blockIdx.x / query_tiles;
  int first_query = blockIdx.x % query_tiles * QUERIES;
  int chunk = blockIdx.y % chunks, first_channel = chunk * CHANNELS;
  int share = blockIdx.y / chunks, shares = gridDim.y / chunks;
  int begin = share * tiles_a_share, end = min(begin + tiles_a_share, (M + KEYS - 1) / KEYS);
  int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS;
  query += (long long)batch * D * N + (long long)first_query * (NHWC ? D : 1);
  key += (long long)batch * D * M;
  value += (long long)batch * C * M + (long long)first_channel * (NHWC ? 1 : M);

  float o[CHANNELS / 32][ROWS] = {};         // of queries warp_row… and channels lane, lane + 32, …
  float largest[2] = {LOWEST, LOWEST};       // of the two queries whose logits the lane makes, lane / 8 and 4 further
  float weights[2] = {};                     // their sum, of the lane's keys only

  for (int tile = begin; tile < end; tile++) {
    int first_key = tile * KEYS;
    float p[2][2] = {};  // logits, then weights, of the lane's two queries and keys lane % 8 and 8 further
    for (int feature = 0; feature < D; feature += HEAD) {
      __syncthreads();  // all have left the tiles
      long long feature_of_query = (long long)feature * (NHWC ? 1 : N), feature_of_key = (long long)feature * M;
      if (D > HEAD || tile == begin) {
        load<QUERIES, HEAD, !NHWC>(query_tile, query + feature_of_query, N - first_query, D - feature, NHWC ? D : N);
      }
      load<KEYS, HEAD, !NHWC>(key_tile, key + (NHWC ? (long long)first_key * D + feature : feature_of_key + first_key),
                              M - first_key, D - feature, NHWC ? D : M);
      if (feature == 0) {
        load<CHANNELS, KEYS, NHWC>(value_tile, value + (long long)first_key * (NHWC ? C : 1), C - first_channel,
                                   M - first_key, NHWC ? C : M);
      }
      __syncthreads();
      // Where features take several goes, each has a sum of its own: short sums round less than a long one.
      float part[2][2] = {};
      float (&sum)[2][2] = HEAD == 64 ? part : p;
#pragma unroll 2
      for (int d = 0; d < HEAD; d += 4) {
        float4 q[2], k[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          q[i] = *(const float4*)(query_tile + (warp_row + lane / 8 + 4 * i) * PITCH<HEAD> + d);
          k[i] = *(const float4*)(key_tile + (lane % 8 + 8 * i) * PITCH<HEAD> + d);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i / 2][i % 2] = dot(q[i / 2], k[i % 2], sum[i / 2][i % 2]);
      }
      if constexpr (HEAD == 64) {
#pragma unroll
        for (int i = 0; i < 4; i++) p[i / 2][i % 2] += part[i / 2][i % 2];
      }
    }

    float scale[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (first_key + lane % 8 + 8 * i >= M) p[row][i] = minus_infinity();
      }
      float before = largest[row];
      largest[row] = fmaxf(before, fmaxf(p[row][0], p[row][1]));
#pragma unroll
      for (int apart = 1; apart < 8; apart *= 2) {
        largest[row] = fmaxf(largest[row], __shfl_xor_sync(~0u, largest[row], apart));
      }
      scale[row] = weight(before, largest[row]);
      weights[row] *= scale[row];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        p[row][i] = weight(p[row][i], largest[row]);
        weights[row] += p[row][i];
        weight_tile[(warp_row + lane / 8 + 4 * row) * PITCH<KEYS> + lane % 8 + 8 * i] = p[row][i];
      }
    }
    __syncwarp();
    if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1)) {
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        float of_row = __shfl_sync(~0u, scale[row / 4], row % 4 * 8);
#pragma unroll
        for (int j = 0; j < CHANNELS / 32; j++) o[j][row] *= of_row;
      }
    }
#pragma unroll 1
    for (int k = 0; k < KEYS; k += 4) {
      float4 w[ROWS];
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        w[row] = *(const float4*)(weight_tile + (warp_row + row) * PITCH<KEYS> + k);
      }
#pragma unroll
      for (int j = 0; j < CHANNELS / 32; j++) {
        float4 v = *(const float4*)(value_tile + (lane + 32 * j) * PITCH<KEYS> + k);
#pragma unroll
        for (int row = 0; row < ROWS; row++) o[j][row] = dot(w[row], v, o[j][row]);
      }
    }
    __syncwarp();
  }

  // From here on each lane knows all of its warp's queries.
  float maximum[ROWS], sum[ROWS];
#pragma unroll
  for (int row = 0; row < 2; row++) {
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) weights[row] += __shfl_xor_sync(~0u, weights[row], apart);
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    maximum[row] = __shfl_sync(~0u, largest[row / 4], row % 4 * 8);
    sum[row] = __shfl_sync(~0u, weights[row / 4], row % 4 * 8);
  }
  int group = blockIdx.x * chunks + chunk;  // of blocks that share their keys
  workspace += (long long)group * shares * (2 * ROWS + CHANNELS / 32 * ROWS) * THREADS;
  if (!join_shares(o, maximum, sum, workspace, arrived + group, share, shares)) return;

  long long of_batch = (long long)batch * C * N;
  float strength = *gamma;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    int position = first_query + warp_row + row;
    if (position >= N) break;
    float inverse = 1 / sum[row];
    if (log_sum_exp && chunk == 0 && lane == 0) {
      log_sum_exp[(long long)batch * N + position] = maximum[row] + logf(sum[row]);
    }
#pragma unroll
    for (int j = 0; j < CHANNELS / 32; j++) {
      int channel = first_channel + lane + 32 * j;
      if (channel >= C) break;
      long long place = of_batch + (NHWC ? (long long)position * C + channel : (long long)channel * N + position);
      write(out, attended, residual, place, o[j][row] * inverse, strength);
    }
    __syncwarp();  // keeps the compiler from fetching more residuals at a time than registers hold
  }
}

#define KERNEL(NAME, T, NHWC)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                      \
      NAME(const T* query,      /* [B, D, N], or channels-last as all that follow */                            \
           const T* key,        /* [B, D, M] */                                                                 \
           const T* value,      /* [B, C, M] */                                                                 \
           const T* residual,   /* [B, C, N] */                                                                 \
           const float* gamma,  /* [1] */                                                                       \
           T* out,              /* [B, C, N] */                                                                 \
           T* attended,         /* [B, C, N] or null */                                                         \
           float* log_sum_exp,  /* [B, N] or null */                                                            \
           float* workspace,    /* of join_shares, [B, tiles of queries, chunks]; null if one share */          \
           unsigned* arrived,   /* [B, tiles of queries, chunks], zeros before and after; null if one share */  \
           int D, int C, int N, int M, int chunks, int tiles_a_share) {                                         \
    attend<T, NHWC>(query, key, value, residual, gamma, out, attended, log_sum_exp, workspace, arrived, D, C,   \
                    N, M, chunks, tiles_a_share);                                                               \
  }

#ifdef PLUGIN
#include "plugin.cuh"
#else
KERNEL(cross_attention_simt_f32_nchw, float, false)
KERNEL(cross_attention_simt_f32_nhwc, float, true)
KERNEL(cross_attention_simt_f16_nchw, f16, false)
KERNEL(cross_attention_simt_f16_nhwc, f16, true)
KERNEL(cross_attention_simt_bf16_nchw, bf16, false)
KERNEL(cross_attention_simt_bf16_nhwc, bf16, true)
#endif
