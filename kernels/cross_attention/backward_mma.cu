// The two passes of the backward on tensor cores (sm_80 and later, 16-bit tensors): d key and d value, one block for
// 64 keys that all queries pass by; d query, one block for 64 queries that all keys pass by. Both are the same walk:
//
//   rows     the 64 pixels the block owns        key pass: keys       query pass: queries
//   columns  the pixels that pass by, 32 a time  key pass: queries    query pass: keys
//   head     the D channels of query and key, zeros up to HEAD; of the rows and of the columns
//   wide     the C channels of value (of keys) and of grad (of queries), zeros up to WIDE
//
//   S = head_rowsᵀ head_columns      P = exp(S - log_sum_exp of the query)
//   G = wide_rowsᵀ wide_columns      dS = P (G - delta of the query)
//   d head_rows += dS head_columnsᵀ  and in the key pass, d wide_rows += P wide_columnsᵀ
//
// Each of the four warps owns 16 rows, so that S, P, G and dS never leave its registers. gamma is left to the sum over
// the splits of the columns.
#include "ptx.cuh"

#ifndef HEAD
#define HEAD 32
#endif
#ifndef WIDE
#define WIDE 256
#endif

constexpr int ROWS = 64, COLUMNS = 32, THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;

// CHANNELS × PIXELS of a tensor in shared memory, contiguous along what is contiguous in the tensor. Eight elements
// (16 bytes) between the lines keep ldmatrix free of bank conflicts.
template <bool NHWC, int CHANNELS, int PIXELS> struct Tile {
  static constexpr int LINES = NHWC ? PIXELS : CHANNELS, LENGTH = NHWC ? CHANNELS : PIXELS;
  static constexpr int PITCH = LENGTH + 8, ELEMENTS = LINES * PITCH;
  static __device__ __forceinline__ int place(int channel, int pixel) {
    return NHWC ? pixel * PITCH + channel : channel * PITCH + pixel;
  }
};

// Starts copying pixels `first`… of one sample into `tile`, zeros beyond the tensor. `aligned`: every line starts at a
// multiple of 16 bytes and is a multiple of 8 elements long.
template <bool NHWC, int CHANNELS, int PIXELS, class T>
__device__ __forceinline__ void load(T* tile, const T* __restrict__ sample, int channels, int pixels, int first,
                                     bool aligned) {
  using Place = Tile<NHWC, CHANNELS, PIXELS>;
  constexpr int PIECES = Place::LENGTH / 8;  // of a line
  int pitch = NHWC ? channels : pixels;
  for (int i = threadIdx.x; i < Place::LINES * PIECES; i += THREADS) {
    int line = i / PIECES, start = i % PIECES * 8;
    int channel = NHWC ? start : line, pixel = first + (NHWC ? line : start);
    T* to = tile + line * Place::PITCH + start;
    if (aligned) {
      bool valid = channel < channels && pixel < pixels;
      long long from = NHWC ? (long long)pixel * pitch + channel : (long long)channel * pitch + pixel;
      cp_async<16>(to, valid ? sample + from : sample, valid);
    } else {
      for (int j = 0; j < 8; j++) {
        int c = channel + (NHWC ? j : 0), p = pixel + (NHWC ? 0 : j);
        long long from = NHWC ? (long long)p * pitch + c : (long long)c * pitch + p;
        to[j] = c < channels && p < pixels ? sample[from] : T{0};
      }
    }
  }
}

// Four 8 × 8 matrices of a tile at `channel`, `pixel`: 16 channels × 16 pixels, in the order
//   (0, 0), (0, 8), (8, 0), (8, 8) of (channel, pixel) where PIXELS_FIRST, else (0, 0), (8, 0), (0, 8), (8, 8).
// Register pairs run along the channels (ALONG_CHANNELS) or along the pixels, whichever way the tile is stored.
template <class Place, bool NHWC, bool PIXELS_FIRST, bool ALONG_CHANNELS, class T>
__device__ __forceinline__ void fragments(unsigned (&r)[4], const T* tile, int channel, int pixel) {
  int lane = threadIdx.x % 32, line = lane % 8, once = lane / 8 % 2 * 8, twice = lane / 16 * 8;
  int c = channel + (PIXELS_FIRST ? twice : once), p = pixel + (PIXELS_FIRST ? once : twice);
  const T* row = tile + Place::place(NHWC ? c : c + line, NHWC ? p + line : p);
  if constexpr (NHWC == ALONG_CHANNELS) {
    ldmatrix_x4(r, row);
  } else {
    ldmatrix_x4_trans(r, row);
  }
}

// (left, right) += a b for the two neighbouring tiles of 8 columns that one ldmatrix_x4 brings.
template <class T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[4]) {
  mma_16x8x16<T>(left, a, {b[0], b[1]});
  mma_16x8x16<T>(right, a, {b[2], b[3]});
}

// Columns 16 k … 16 k + 15 of a 16 × COLUMNS result become the left operand of the next product.
template <class T>
__device__ __forceinline__ void as_operand(unsigned (&a)[4], const float (&d)[COLUMNS / 8][4], int k) {
  a[0] = pack<T>(d[2 * k][0], d[2 * k][1]);
  a[1] = pack<T>(d[2 * k][2], d[2 * k][3]);
  a[2] = pack<T>(d[2 * k + 1][0], d[2 * k + 1][1]);
  a[3] = pack<T>(d[2 * k + 1][2], d[2 * k + 1][3]);
}

// In the query pass wide_rows moves on to registers, and its place is that of wide_columns.
template <class T, bool NHWC, bool KEY_PASS> struct Shared {
  static constexpr int WIDE_ROWS = Tile<NHWC, WIDE, ROWS>::ELEMENTS, WIDE_COLUMNS = Tile<NHWC, WIDE, COLUMNS>::ELEMENTS;
  static_assert(WIDE_ROWS <= 2 * WIDE_COLUMNS, "wide_rows fits where wide_columns will be");
  T head_rows[Tile<NHWC, HEAD, ROWS>::ELEMENTS], head_columns[2][Tile<NHWC, HEAD, COLUMNS>::ELEMENTS];
  T wide[(KEY_PASS ? WIDE_ROWS : 0) + 2 * WIDE_COLUMNS];
  float log_sum_exp[2][COLUMNS], delta[2][COLUMNS];
};

template <class T, bool NHWC, bool KEY_PASS>
__device__ void pass(const T* __restrict__ head_of_rows,         // [B, D, rows]
                     const T* __restrict__ wide_of_rows,         // [B, C, rows]
                     const T* __restrict__ head_of_columns,      // [B, D, columns]
                     const T* __restrict__ wide_of_columns,      // [B, C, columns]
                     const float* __restrict__ log_sum_exp,      // [B, queries]
                     const float* __restrict__ delta,            // [B, queries]
                     float* __restrict__ head_partial,           // [splits, B, rows, HEAD]
                     float* __restrict__ wide_partial,           // [splits, B, rows, WIDE], of the key pass
                     int head, int wide, int rows, int columns, int aligned) {
#if __CUDA_ARCH__ >= 800  // never launched on what is older
  using HeadRows = Tile<NHWC, HEAD, ROWS>;
  using WideRows = Tile<NHWC, WIDE, ROWS>;
  using HeadColumns = Tile<NHWC, HEAD, COLUMNS>;
  using WideColumns = Tile<NHWC, WIDE, COLUMNS>;
  constexpr int TILES = COLUMNS / 8;  // of 8 columns, as mma gives them
  using Memory = Shared<T, NHWC, KEY_PASS>;
  Memory& shared = *(Memory*)dynamic_shared();
  T* wide_rows = shared.wide;
  T* wide_of_stages = shared.wide + (KEY_PASS ? Memory::WIDE_ROWS : 0);

  int sample = blockIdx.z, first_row = blockIdx.x * ROWS;
  int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  head_of_rows += (long long)sample * head * rows;
  wide_of_rows += (long long)sample * wide * rows;
  head_of_columns += (long long)sample * head * columns;
  wide_of_columns += (long long)sample * wide * columns;
  log_sum_exp += (long long)sample * (KEY_PASS ? columns : rows);
  delta += (long long)sample * (KEY_PASS ? columns : rows);

  // The share of this split: whole tiles of columns.
  int tiles = (columns + COLUMNS - 1) / COLUMNS, share = (tiles + gridDim.y - 1) / gridDim.y;
  int begin = min((int)blockIdx.y * share, tiles), end = min(begin + share, tiles);

  auto load_columns = [&](int tile) {
    int first = tile * COLUMNS, stage = tile % 2;
    load<NHWC, HEAD, COLUMNS>(shared.head_columns[stage], head_of_columns, head, columns, first, aligned);
    load<NHWC, WIDE, COLUMNS>(wide_of_stages + stage * Memory::WIDE_COLUMNS, wide_of_columns, wide, columns, first,
                              aligned);
    if (KEY_PASS && threadIdx.x < COLUMNS) {
      int column = first + threadIdx.x;
      bool valid = column < columns;
      cp_async<4>(&shared.log_sum_exp[stage][threadIdx.x], log_sum_exp + (valid ? column : 0), valid);
      cp_async<4>(&shared.delta[stage][threadIdx.x], delta + (valid ? column : 0), valid);
    }
    cp_async_commit();
  };
  load<NHWC, HEAD, ROWS>(shared.head_rows, head_of_rows, head, rows, first_row, aligned);
  load<NHWC, WIDE, ROWS>(wide_rows, wide_of_rows, wide, rows, first_row, aligned);
  cp_async_commit();
  if (KEY_PASS && begin < end) load_columns(begin);

  // In the query pass a lane's two rows are queries, and their statistics stay with it.
  float row_log_sum_exp[2] = {}, row_delta[2] = {};
  if constexpr (!KEY_PASS) {
    for (int i = 0; i < 2; i++) {
      int row = first_row + warp_row + lane / 4 + 8 * i;
      if (row < rows) row_log_sum_exp[i] = log_sum_exp[row], row_delta[i] = delta[row];
    }
  }

  // The rows as left operands stay in registers, which the key pass needs for its sums.
  unsigned head_kept[KEY_PASS ? 1 : HEAD / 16][4], wide_kept[KEY_PASS ? 1 : WIDE / 16][4];
  if constexpr (!KEY_PASS) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
      fragments<HeadRows, NHWC, true, true>(head_kept[k], shared.head_rows, 16 * k, warp_row);
    }
#pragma unroll
    for (int k = 0; k < WIDE / 16; k++) {
      fragments<WideRows, NHWC, true, true>(wide_kept[k], wide_rows, 16 * k, warp_row);
    }
    __syncthreads();
    if (begin < end) load_columns(begin);
  }

  float head_sum[HEAD / 8][4] = {}, wide_sum[KEY_PASS ? WIDE / 8 : 1][4] = {};
  for (int tile = begin; tile < end; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and all have left the one before, whose place the next takes
    if (tile + 1 < end) load_columns(tile + 1);
    const T* head_columns = shared.head_columns[tile % 2];
    const T* wide_columns = wide_of_stages + tile % 2 * Memory::WIDE_COLUMNS;

    float weight[TILES][4] = {};  // S, then P
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
      unsigned now[4];
      if constexpr (KEY_PASS) fragments<HeadRows, NHWC, true, true>(now, shared.head_rows, 16 * k, warp_row);
      const unsigned(&a)[4] = KEY_PASS ? now : head_kept[KEY_PASS ? 0 : k];
#pragma unroll
      for (int j = 0; j < TILES; j += 2) {
        unsigned b[4];
        fragments<HeadColumns, NHWC, false, true>(b, head_columns, 16 * k, 8 * j);
        mma_pair<T>(weight[j], weight[j + 1], a, b);
      }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int column = 8 * j + lane % 4 * 2 + i % 2;
        float of_query = KEY_PASS ? shared.log_sum_exp[tile % 2][column] : row_log_sum_exp[i / 2];
        weight[j][i] = exp2_fast((weight[j][i] - of_query) * LOG2_E);
        // A key beyond the last has S = 0, of which nothing bounds the weight; a query beyond the last is all zeros.
        if (!KEY_PASS && tile * COLUMNS + column >= columns) weight[j][i] = 0;
      }
    }
    if constexpr (KEY_PASS) {
#pragma unroll
      for (int k = 0; k < COLUMNS / 16; k++) {
        unsigned a[4];
        as_operand<T>(a, weight, k);
#pragma unroll
        for (int j = 0; j < WIDE / 8; j += 2) {
          unsigned b[4];
          fragments<WideColumns, NHWC, true, false>(b, wide_columns, 8 * j, 16 * k);
          mma_pair<T>(wide_sum[j], wide_sum[j + 1], a, b);
        }
      }
    }

    float slope[TILES][4] = {};  // G, then dS
#pragma unroll
    for (int k = 0; k < WIDE / 16; k++) {
      unsigned now[4];
      if constexpr (KEY_PASS) fragments<WideRows, NHWC, true, true>(now, wide_rows, 16 * k, warp_row);
      const unsigned(&a)[4] = KEY_PASS ? now : wide_kept[KEY_PASS ? 0 : k];
#pragma unroll
      for (int j = 0; j < TILES; j += 2) {
        unsigned b[4];
        fragments<WideColumns, NHWC, false, true>(b, wide_columns, 16 * k, 8 * j);
        mma_pair<T>(slope[j], slope[j + 1], a, b);
      }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float of_query = KEY_PASS ? shared.delta[tile % 2][8 * j + lane % 4 * 2 + i % 2] : row_delta[i / 2];
        slope[j][i] = weight[j][i] * (slope[j][i] - of_query);
      }
    }
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
      unsigned a[4];
      as_operand<T>(a, slope, k);
#pragma unroll
      for (int j = 0; j < HEAD / 8; j += 2) {
        unsigned b[4];
        fragments<HeadColumns, NHWC, true, false>(b, head_columns, 8 * j, 16 * k);
        mma_pair<T>(head_sum[j], head_sum[j + 1], a, b);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = first_row + warp_row + lane / 4 + 8 * half;
    if (row < rows) {
      long long line = ((long long)blockIdx.y * gridDim.z + sample) * rows + row;
#pragma unroll
      for (int j = 0; j < HEAD / 8; j++) {
        *(float2*)(head_partial + line * HEAD + 8 * j + lane % 4 * 2) =
            make_float2(head_sum[j][2 * half], head_sum[j][2 * half + 1]);
      }
      if constexpr (KEY_PASS) {
#pragma unroll
        for (int j = 0; j < WIDE / 8; j++) {
          *(float2*)(wide_partial + line * WIDE + 8 * j + lane % 4 * 2) =
              make_float2(wide_sum[j][2 * half], wide_sum[j][2 * half + 1]);
        }
      }
    }
  }
#endif
}

#define ENTRY_POINTS(NAME, T, LAYOUT, NHWC)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_keys_##NAME##_##LAYOUT(                          \
      const T* query, const T* key, const T* value, const T* grad, const float* log_sum_exp, const float* delta,     \
      float* dkey, float* dvalue, int head, int wide, int queries, int keys, int aligned) {                          \
    pass<T, NHWC, true>(key, value, query, grad, log_sum_exp, delta, dkey, dvalue, head, wide, keys, queries,        \
                        aligned);                                                                                    \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, HEAD == 32 ? 3 : 2) backward_queries_##NAME##_##LAYOUT(       \
      const T* query, const T* key, const T* value, const T* grad, const float* log_sum_exp, const float* delta,     \
      float* dquery, int head, int wide, int queries, int keys, int aligned) {                                       \
    pass<T, NHWC, false>(query, grad, key, value, log_sum_exp, delta, dquery, nullptr, head, wide, queries, keys,    \
                         aligned);                                                                                   \
  }
ENTRY_POINTS(f16, f16, nchw, false)
ENTRY_POINTS(f16, f16, nhwc, true)
ENTRY_POINTS(bf16, bf16, nchw, false)
ENTRY_POINTS(bf16, bf16, nhwc, true)
