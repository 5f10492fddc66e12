// out = gamma · softmax(QᵀK)·V + residual on tensor cores, for 16-bit tensors: one pass over the keys, no logits stored.
//
// A block is four warps of 16 queries each. It walks over its share of the keys in tiles of KEYS; while one tile is used
// the next comes in. A warp multiplies its queries with the keys of a tile, turns the logits into weights relative to
// the largest so far, and hands the weights, which lie in its registers just as the next product wants them, on to the
// product with the values. A block makes one chunk of CHANNELS channels; other chunks are other blocks, and where there
// are few queries, so are other shares of the keys.
#include "online_softmax.cuh"

#ifndef HEAD
#define HEAD 32  // D, filled up with zeros to a multiple of 16
#endif
#ifndef CHANNELS
#define CHANNELS 256  // of a chunk, a multiple of 16
#endif
#ifndef KEYS
#define KEYS 64  // of a tile, a multiple of 16
#endif

constexpr int WARPS = 4, QUERIES = 16 * WARPS, THREADS = 32 * WARPS;

// FEATURES × POSITIONS of a tensor in shared memory, in lines along what is contiguous in the tensor. The 16-byte pieces
// of a line are swizzled, so that those at one place of 8 successive lines lie in different banks, as ldmatrix wants.
template <bool NHWC_, int FEATURES, int POSITIONS> struct Tile {
  static constexpr bool NHWC = NHWC_;
  static constexpr int LINES = NHWC ? POSITIONS : FEATURES, LENGTH = NHWC ? FEATURES : POSITIONS;
  static constexpr int PIECES = LENGTH / 8, SWIZZLE = PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2;
  static constexpr int ELEMENTS = LINES * LENGTH;
  static __device__ __forceinline__ int place(int line, int piece) {
    return line * LENGTH + (piece ^ line / (8 / SWIZZLE) % SWIZZLE) * 8;
  }
};

// Starts copying positions `first`… of one sample into `tile`, zeros outside of the tensor. `aligned`: lines of the
// tensor start at multiples of 16 bytes and hold multiples of 8 elements; otherwise the copy is done at once.
template <class Tile, class T>
__device__ __forceinline__ void load(T* tile, const T* sample, int first, int features, int positions, int channels,
                                     bool aligned) {
  const T* source = sample + (Tile::NHWC ? (long long)first * channels : first);
  int lines = Tile::NHWC ? positions - first : features, length = Tile::NHWC ? features : positions - first;
  int pitch = Tile::NHWC ? channels : positions;
#pragma unroll 2
  for (int i = threadIdx.x; i < Tile::LINES * Tile::PIECES; i += THREADS) {
    int line = i / Tile::PIECES, piece = i % Tile::PIECES;
    const T* from = source + ((unsigned)line * pitch + piece * 8);  // 32 bits hold it: pitch < 2^24
    T* to = tile + Tile::place(line, piece);
    if (aligned) {
      bool inside = line < lines && piece * 8 < length;
      cp_async<16>(to, inside ? from : sample, inside);
    } else {
      unsigned words[4] = {};
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (line < lines && piece * 8 + j < length) words[j / 2] |= (unsigned)from[j].bits << j % 2 * 16;
      }
      *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Four 8 × 8 matrices of a tile, of the 16 features and 16 positions from here on: first the next along FEATURES_FIRST,
// then along the other. Pairs in a register run along the features (PAIRED_FEATURES) or along the positions.
template <class Tile, bool FEATURES_FIRST, bool PAIRED_FEATURES, class T>
__device__ __forceinline__ void fragments(unsigned (&r)[4], const T* tile, int feature, int position) {
  int lane = threadIdx.x % 32, inner = lane / 8 % 2 * 8, outer = lane / 16 * 8;
  feature += FEATURES_FIRST ? inner : outer;
  position += FEATURES_FIRST ? outer : inner;
  int line = (Tile::NHWC ? position : feature) + lane % 8, piece = (Tile::NHWC ? feature : position) / 8;
  if constexpr (Tile::NHWC == PAIRED_FEATURES) {
    ldmatrix_x4(r, tile + Tile::place(line, piece));
  } else {
    ldmatrix_x4_trans(r, tile + Tile::place(line, piece));
  }
}

// d[16 × 16], as two neighbours of 16 × 8, += a b.
template <class T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[4]) {
  mma_16x8x16<T>(left, a, {b[0], b[1]});
  mma_16x8x16<T>(right, a, {b[2], b[3]});
}

template <class T, bool NHWC>
__device__ __forceinline__ void attend(const T* query, const T* key, const T* value, const T* residual,
                                       const float* gamma, T* out, T* attended, float* log_sum_exp, float* workspace,
                                       unsigned* arrived, int D, int C, int N, int M, int chunks, int tiles_a_share,
                                       bool aligned) {
  using QueryTile = Tile<NHWC, HEAD, QUERIES>;
  using KeyTile = Tile<NHWC, HEAD, KEYS>;
  using ValueTile = Tile<NHWC, CHANNELS, KEYS>;
  constexpr int STAGE = KeyTile::ELEMENTS + ValueTile::ELEMENTS;
  T* query_tile = (T*)dynamic_shared();
  T* stages = query_tile + QueryTile::ELEMENTS;

  int query_tiles = (N + QUERIES - 1) / QUERIES, batch = blockIdx.x / query_tiles;
  int first_query = blockIdx.x % query_tiles * QUERIES;
  int chunk = blockIdx.y % chunks, first_channel = chunk * CHANNELS;
  int share = blockIdx.y / chunks, shares = gridDim.y / chunks;
  int begin = share * tiles_a_share, end = min(begin + tiles_a_share, (M + KEYS - 1) / KEYS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  query += (long long)batch * D * N;
  key += (long long)batch * D * M;
  value += (long long)batch * C * M + (long long)first_channel * (NHWC ? 1 : M);

  auto load_keys = [&](int tile) {
    T* stage = stages + tile % 2 * STAGE;
    load<KeyTile>(stage, key, tile * KEYS, D, M, D, aligned);
    load<ValueTile>(stage + KeyTile::ELEMENTS, value, tile * KEYS, C - first_channel, M, C, aligned);
    cp_async_commit();
  };
  load<QueryTile>(query_tile, query, first_query, D, N, D, aligned);
  load_keys(begin);

  float o[CHANNELS / 8][4] = {};  // o[j] is the result of mma_16x8x16 for channels 8 j … 8 j + 7
  float maximum[2] = {LOWEST, LOWEST}, sum[2] = {};  // of the lane's queries lane / 4 and 8 further; its keys only

  for (int tile = begin; tile < end; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and all have left the one before, whose place the next takes
    if (tile + 1 < end) load_keys(tile + 1);
    const T* key_tile = stages + tile % 2 * STAGE;
    const T* value_tile = key_tile + KeyTile::ELEMENTS;

    float p[KEYS / 8][4] = {};  // logits, then weights
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
      unsigned a[4];  // read anew for every tile: the registers are full
      fragments<QueryTile, false, true>(a, query_tile, 16 * k, 16 * warp);
#pragma unroll
      for (int j = 0; j < KEYS / 8; j += 2) {
        unsigned b[4];
        fragments<KeyTile, true, true>(b, key_tile, 16 * k, 8 * j);
        mma_pair<T>(p[j], p[j + 1], a, b);
      }
    }

    if ((tile + 1) * KEYS > M) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) {
        if (tile * KEYS + i / 4 * 8 + lane % 4 * 2 + i % 2 >= M) p[i / 4][i % 4] = minus_infinity();
      }
    }
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], p[i / 4][i % 4]);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      largest[row] = fmaxf(largest[row], __shfl_xor_sync(~0u, largest[row], 1));
      largest[row] = fmaxf(largest[row], __shfl_xor_sync(~0u, largest[row], 2));
    }
    if (__any_sync(~0u, largest[0] > maximum[0] || largest[1] > maximum[1])) {
      float scale[2] = {weight(maximum[0], largest[0]), weight(maximum[1], largest[1])};
#pragma unroll
      for (int i = 0; i < CHANNELS / 2; i++) o[i / 4][i % 4] *= scale[i / 2 % 2];
#pragma unroll
      for (int row = 0; row < 2; row++) {
        sum[row] *= scale[row];
        maximum[row] = largest[row];
      }
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      p[i / 4][i % 4] = weight(p[i / 4][i % 4], maximum[i / 2 % 2]);
      sum[i / 2 % 2] += p[i / 4][i % 4];
    }

#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = pack<T>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < CHANNELS / 8; j += 2) {
        unsigned b[4];
        fragments<ValueTile, false, false>(b, value_tile, 8 * j, 16 * k);
        mma_pair<T>(o[j], o[j + 1], a, b);
      }
    }
  }

#pragma unroll
  for (int row = 0; row < 2; row++) {
    sum[row] += __shfl_xor_sync(~0u, sum[row], 1);
    sum[row] += __shfl_xor_sync(~0u, sum[row], 2);
  }
  int group = blockIdx.x * chunks + chunk;  // of blocks that share their keys
  workspace += (long long)group * shares * (2 * 2 + CHANNELS / 2) * THREADS;
  if (!join_shares(o, maximum, sum, workspace, arrived + group, share, shares)) return;

  float strength = *gamma;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    int position = first_query + 16 * warp + 8 * row + lane / 4;
    if (position >= N) continue;
    if (log_sum_exp && chunk == 0 && lane % 4 == 0) {
      log_sum_exp[(long long)batch * N + position] = maximum[row] + logf(sum[row]);
    }
    float inverse = 1 / sum[row];
    long long place = (long long)batch * C * N + (NHWC ? (long long)position * C : position);
#pragma unroll
    for (int i = 0; i < CHANNELS / 4; i++) {
      int channel = first_channel + i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (channel < C) {
        write(out, attended, residual, place + channel * (NHWC ? 1ll : N), o[i / 2][2 * row + i % 2] * inverse,
              strength);
      }
    }
  }
}

#define KERNEL(NAME, T, NHWC)                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                     \
      NAME(const T* query,       /* [B, D, N], or channels-last as all that follow */                          \
           const T* key,         /* [B, D, M] */                                                               \
           const T* value,       /* [B, C, M] */                                                               \
           const T* residual,    /* [B, C, N] */                                                               \
           const float* gamma,   /* [1] */                                                                     \
           T* out,               /* [B, C, N] */                                                               \
           T* attended,          /* [B, C, N] or null */                                                       \
           float* log_sum_exp,   /* [B, N] or null */                                                          \
           float* workspace,     /* of join_shares, [B, tiles of queries, chunks]; null if one share */        \
           unsigned* arrived,    /* [B, tiles of queries, chunks], zeros before and after; null if one share */ \
           int D, int C, int N, int M, int chunks, int tiles_a_share, int aligned) {                           \
    attend<T, NHWC>(query, key, value, residual, gamma, out, attended, log_sum_exp, workspace, arrived, D, C,  \
                    N, M, chunks, tiles_a_share, aligned);                                                     \
  }

#ifdef PLUGIN
#include "plugin.cuh"
#else
KERNEL(cross_attention_mma_f16_nchw, f16, false)
KERNEL(cross_attention_mma_f16_nhwc, f16, true)
#if __CUDA_ARCH__ >= 800
KERNEL(cross_attention_mma_bf16_nchw, bf16, false)
KERNEL(cross_attention_mma_bf16_nhwc, bf16, true)
#endif
#endif
