// The backward with ordinary arithmetic: every type, size and architecture. Each of d value, d key and d query is a sum
//
//   result[c, row] = Σ_column factor[row, column] summand[c, column]
//
//             row    column  factor                            summand
//   d value   key    query   P = exp(S - log_sum_exp[query])   grad
//   d key     key    query   dS = P (G - delta[query])         query
//   d query   query  key     dS                                key
//
// with S = queryᵀ key and G = gradᵀ value. A block owns 64 rows and a slab of the result's channels; it makes the
// factors of 128 columns at a time in shared memory, and both products run in tiles of registers. gamma is left to the
// sum over the splits of the columns.
#include "ptx.cuh"

constexpr int ROWS = 64, COLUMNS = 128, CHUNK = 8, THREADS = 128;
constexpr int ROW_PITCH = ROWS + 4, COLUMN_PITCH = COLUMNS + 4;
enum class Result { VALUE, KEY, QUERY };

// CHUNK × WIDTH elements on their way from a tensor to shared memory, fetched while the last ones are still multiplied.
// Neighbouring threads read neighbouring elements.
template <int WIDTH> struct Chunk {
  float ahead[CHUNK * WIDTH / THREADS];

  // from[k, x], zeros beyond the limits
  template <class T>
  __device__ __forceinline__ void fetch(const T* __restrict__ from, int k_stride, int x_stride, int k_limit,
                                        int x_limit) {
#pragma unroll
    for (int i = 0; i < CHUNK * WIDTH / THREADS; i++) {
      int k = row(i, k_stride), x = column(i, k_stride);
      bool valid = k < k_limit && x < x_limit;
      ahead[i] = valid ? to_float(from[k * k_stride + x * x_stride]) : 0.0f;  // at most 128 lines on: 32 bits do
    }
  }
  __device__ __forceinline__ void put(float* to, int k_stride) const {
#pragma unroll
    for (int i = 0; i < CHUNK * WIDTH / THREADS; i++) to[row(i, k_stride) * (WIDTH + 4) + column(i, k_stride)] = ahead[i];
  }
  static __device__ __forceinline__ int row(int i, int k_stride) {
    return k_stride == 1 ? threadIdx.x % CHUNK : (i * THREADS + threadIdx.x) / WIDTH;
  }
  static __device__ __forceinline__ int column(int i, int k_stride) {
    return k_stride == 1 ? (i * THREADS + threadIdx.x) / CHUNK : (i * THREADS + threadIdx.x) % WIDTH;
  }
};

// A thread's part of a ROWS × WIDTH result: QUADS × QUADS tiles of 4 × 4.
template <int WIDTH> struct Part {
  static constexpr int QUADS = WIDTH == 128 ? 2 : 1;
  static constexpr int ACROSS = WIDTH / 4 / QUADS, DOWN = THREADS / ACROSS;
  static_assert(DOWN * 4 * QUADS == ROWS, "the threads cover the rows");
  static __device__ __forceinline__ int row(int quad) { return 4 * (threadIdx.x / ACROSS + quad * DOWN); }
  static __device__ __forceinline__ int column(int quad) { return 4 * (threadIdx.x % ACROSS + quad * ACROSS); }
};
template <int WIDTH> using Sums = float[4 * Part<WIDTH>::QUADS][4 * Part<WIDTH>::QUADS];

// sums[row, x] += Σ_k a[k, row] b[k, x]
template <int WIDTH>
__device__ __forceinline__ void multiply(Sums<WIDTH>& sums, const float* a, const float* b) {
  constexpr int QUADS = Part<WIDTH>::QUADS;
#pragma unroll
  for (int k = 0; k < CHUNK; k++) {
    __align__(16) float left[4 * QUADS], right[4 * QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
      *(float4*)&left[4 * q] = *(const float4*)&a[k * ROW_PITCH + Part<WIDTH>::row(q)];
      *(float4*)&right[4 * q] = *(const float4*)&b[k * (WIDTH + 4) + Part<WIDTH>::column(q)];
    }
#pragma unroll
    for (int i = 0; i < 4 * QUADS; i++) {
#pragma unroll
      for (int j = 0; j < 4 * QUADS; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
  }
}

template <Result RESULT, int SLAB, class T>
__device__ void pass(const T* __restrict__ query,            // [B, D, queries], as are the strides
                     const T* __restrict__ key,              // [B, D, keys]
                     const T* __restrict__ value,            // [B, C, keys]
                     const T* __restrict__ grad,             // [B, C, queries]
                     const float* __restrict__ log_sum_exp,  // [B, queries]
                     const float* __restrict__ delta,        // [B, queries]
                     float* __restrict__ partial,            // [splits, B, rows, pitch]
                     int head, int wide, int queries, int keys, int channels_last, int pitch, int slabs) {
  constexpr bool ROWS_ARE_QUERIES = RESULT == Result::QUERY;
  float* row_chunk = (float*)dynamic_shared();             // [CHUNK, ROWS]
  float* column_chunk = row_chunk + CHUNK * ROW_PITCH;     // [CHUNK, COLUMNS], then [CHUNK, SLAB] of the summand
  float* factor = column_chunk + CHUNK * COLUMN_PITCH;     // [COLUMNS, ROWS]: P, then dS

  int sample = blockIdx.z, slab = blockIdx.y % slabs * SLAB, split = blockIdx.y / slabs;
  int splits = gridDim.y / slabs;
  query += (long long)sample * head * queries;
  key += (long long)sample * head * keys;
  value += (long long)sample * wide * keys;
  grad += (long long)sample * wide * queries;
  log_sum_exp += (long long)sample * queries;
  delta += (long long)sample * queries;

  const T* head_of_rows = ROWS_ARE_QUERIES ? query : key;
  const T* head_of_columns = ROWS_ARE_QUERIES ? key : query;
  const T* wide_of_rows = ROWS_ARE_QUERIES ? grad : value;
  const T* wide_of_columns = ROWS_ARE_QUERIES ? value : grad;
  const T* summand = RESULT == Result::VALUE ? grad : head_of_columns;
  int rows = ROWS_ARE_QUERIES ? queries : keys, columns = ROWS_ARE_QUERIES ? keys : queries;
  int channels = RESULT == Result::VALUE ? wide : head;  // of the summand and the result
  int first_row = blockIdx.x * ROWS;

  int tiles = (columns + COLUMNS - 1) / COLUMNS, share = (tiles + splits - 1) / splits;
  int begin = min(split * share, tiles), end = min(begin + share, tiles);

  Sums<SLAB> result = {};
  for (int tile = begin; tile < end; tile++) {
    int first_column = tile * COLUMNS;

    // dots[row, column] = Σ_c of_rows[c, row] of_columns[c, column]
    auto dot = [&](Sums<COLUMNS>& dots, const T* of_rows, const T* of_columns, int count) {
      int row_stride = channels_last ? 1 : rows, column_stride = channels_last ? 1 : columns;  // of a channel
      int pixel = channels_last ? count : 1;
      of_rows += (long long)first_row * pixel;
      of_columns += (long long)first_column * pixel;
      Chunk<ROWS> row_ahead;
      Chunk<COLUMNS> column_ahead;
      auto fetch = [&](int c) {
        row_ahead.fetch(of_rows + (long long)c * row_stride, row_stride, pixel, count - c, rows - first_row);
        column_ahead.fetch(of_columns + (long long)c * column_stride, column_stride, pixel, count - c,
                           columns - first_column);
      };
      fetch(0);
      for (int c = 0; c < count; c += CHUNK) {
        __syncthreads();
        row_ahead.put(row_chunk, row_stride);
        column_ahead.put(column_chunk, column_stride);
        __syncthreads();
        if (c + CHUNK < count) fetch(c + CHUNK);
        multiply<COLUMNS>(dots, row_chunk, column_chunk);
      }
    };
    // Every thread turns its dots into factors: S into P with log_sum_exp, then G and that P into dS with delta.
    auto make_factors = [&](const Sums<COLUMNS>& dots, const float* of_query, bool weights) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          int row = Part<COLUMNS>::row(i / 4) + i % 4, column = Part<COLUMNS>::column(j / 4) + j % 4;
          float& place = factor[column * ROW_PITCH + row];
          if (first_row + row < rows && first_column + column < columns) {
            float difference = dots[i][j] - of_query[ROWS_ARE_QUERIES ? first_row + row : first_column + column];
            place = weights ? expf(difference) : place * difference;
          } else {
            place = 0;
          }
        }
      }
    };
    {
      Sums<COLUMNS> dots = {};
      dot(dots, head_of_rows, head_of_columns, head);
      make_factors(dots, log_sum_exp, true);
    }
    if constexpr (RESULT != Result::VALUE) {
      Sums<COLUMNS> dots = {};
      dot(dots, wide_of_rows, wide_of_columns, wide);
      make_factors(dots, delta, false);
    }

    int channel_stride = channels_last ? 1 : columns, pixel_stride = channels_last ? channels : 1;
    const T* from = summand + (long long)first_column * pixel_stride + (long long)slab * channel_stride;
    Chunk<SLAB> ahead;
    auto fetch = [&](int k) {
      ahead.fetch(from + (long long)k * pixel_stride, pixel_stride, channel_stride, columns - first_column - k,
                  channels - slab);
    };
    fetch(0);
    for (int k = 0; k < COLUMNS; k += CHUNK) {
      __syncthreads();
      ahead.put(column_chunk, pixel_stride);
      __syncthreads();
      if (k + CHUNK < COLUMNS) fetch(k + CHUNK);
      multiply<SLAB>(result, factor + k * ROW_PITCH, column_chunk);
    }
  }

  using Mine = Part<SLAB>;
#pragma unroll
  for (int i = 0; i < 4 * Mine::QUADS; i++) {
    int row = first_row + Mine::row(i / 4) + i % 4;
    if (row < rows) {
      float* line = partial + (((long long)split * gridDim.z + sample) * rows + row) * pitch + slab;
#pragma unroll
      for (int q = 0; q < Mine::QUADS; q++) {
        const float* r = &result[i][4 * q];
        *(float4*)&line[Mine::column(q)] = make_float4(r[0], r[1], r[2], r[3]);
      }
    }
  }
}

#define ENTRY_POINT(NAME, T, RESULT, result, SLAB)                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_##result##_##NAME##_##SLAB(                      \
      const T* query, const T* key, const T* value, const T* grad, const float* log_sum_exp, const float* delta,     \
      float* partial, int head, int wide, int queries, int keys, int channels_last, int pitch, int slabs) {          \
    pass<Result::RESULT, SLAB>(query, key, value, grad, log_sum_exp, delta, partial, head, wide, queries, keys,      \
                               channels_last, pitch, slabs);                                                         \
  }
#define ENTRY_POINTS(NAME, T)               \
  ENTRY_POINT(NAME, T, VALUE, value, 32)    \
  ENTRY_POINT(NAME, T, VALUE, value, 128)   \
  ENTRY_POINT(NAME, T, KEY, key, 32)        \
  ENTRY_POINT(NAME, T, KEY, key, 128)       \
  ENTRY_POINT(NAME, T, QUERY, query, 32)    \
  ENTRY_POINT(NAME, T, QUERY, query, 128)
ENTRY_POINTS(f32, float)
ENTRY_POINTS(f16, f16)
ENTRY_POINTS(bf16, bf16)
