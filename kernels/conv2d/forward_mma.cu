// Convolution on tensor cores by mma.sync: the product [M, K] [K, N] of conv2d.cuh, TILE_M × TILE_N of it a block.
//
// A block walks over its part of K in steps of DEPTH. The steps come in through a ring of STAGES places, each TILE_M
// windows of x and TILE_N rows of the weights; all but one are under way while that one is multiplied. A thread copies
// 8 channels at a time, always the same 8 of a step, so that it follows one tap and channel through K, without dividing.
// The sums then lie in shared memory, where 8 channels of a pixel are next to each other and can be written at once.
#include "conv2d.cuh"

#ifndef TILE_M
#define TILE_M 64  // of M, a multiple of 16 WARPS_M
#endif
#ifndef TILE_N
#define TILE_N 64  // of N, a multiple of 8 WARPS_N
#endif
#ifndef WARPS_M
#define WARPS_M 2
#endif
#ifndef WARPS_N
#define WARPS_N 2
#endif
#ifndef STAGES
#define STAGES 4
#endif

constexpr int DEPTH = 64, PIECES = DEPTH / 8;  // a piece: 8 values of a row, 16 bytes
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int LINES = THREADS / PIECES;  // rows that all threads together copy at a time
constexpr int X_TURNS = (TILE_M + LINES - 1) / LINES, WEIGHT_TURNS = (TILE_N + LINES - 1) / LINES;
constexpr int STAGE = (TILE_M + TILE_N) * DEPTH;  // values
constexpr int PARTS_M = TILE_M / WARPS_M / 16, PARTS_N = TILE_N / WARPS_N / 8;  // of 16 × 8, a warp's
constexpr int PITCH = TILE_N % 16 ? TILE_N : TILE_N + 8;  // of the sums: 4 rows of them lie in different banks
constexpr int RING_BYTES = 2 * STAGES * STAGE, SUMS_BYTES = 4 * TILE_M * PITCH;
constexpr int BLOCKS = TILE_M * TILE_N > 128 * 64 ? 256 / THREADS : TILE_M * TILE_N == 128 * 64 ? 2 : TILE_M * TILE_N >= 64 * 64 ? 3 : 4;
constexpr int FLAG = RING_BYTES > SUMS_BYTES ? RING_BYTES : SUMS_BYTES;  // where a flag lies; 16 bytes end the memory

// Where in a stage a piece of a row lies: swizzled, so that one piece of 8 successive rows lies in different banks.
__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + (piece ^ row % 8) * 8; }

// Copies the steps of K, one at each call of `next`.
template <class T> struct Loader {
  const Conv<T>& conv;
  const T* weight;          // of this thread's first row, at this thread's piece of the step
  Window windows[X_TURNS];  // of this thread's rows of M
  int pixels[X_TURNS];      // what they read with the present tap: where it starts in x; -1 is zeros
  int ky, kx, channel, k;   // of this thread's piece of the next step
  int row, piece, first_n;

  __device__ __forceinline__ Loader(const Conv<T>& conv, int first_m, int first_n, int phase, int step)
      : conv(conv), row(threadIdx.x / PIECES), piece(threadIdx.x % PIECES), first_n(first_n) {
    k = step * DEPTH + piece * 8;
    int tap = k / conv.Cin;
    channel = k % conv.Cin, ky = tap / conv.k, kx = tap % conv.k;
    weight = conv.weight + ((long long)phase * conv.rows + first_n + row) * conv.K() + k;
#pragma unroll
    for (int i = 0; i < X_TURNS; i++) windows[i] = window_of(conv, first_m + row + i * LINES, phase);
    find();
  }

  __device__ __forceinline__ void find() {
#pragma unroll
    for (int i = 0; i < X_TURNS; i++) {
      int source = ky < conv.k ? source_of(conv, windows[i], ky, kx) : -1;
      pixels[i] = source < 0 ? -1 : source * conv.x_pitch;
    }
  }

  // The weights of the step `ahead` of the next.
  __device__ __forceinline__ void copy_weights(T* stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < WEIGHT_TURNS; i++) {
      if (TILE_N % LINES && row + i * LINES >= TILE_N) break;
      bool inside = first_n + row + i * LINES < conv.rows && k + ahead * DEPTH < conv.K();
      const T* from = weight + (long long)i * LINES * conv.K() + ahead * DEPTH;
      cp_async<16>(stage + place(TILE_M + row + i * LINES, piece), inside ? from : conv.weight, inside);
    }
  }

  template <bool WEIGHTS> __device__ __forceinline__ void next(T* stage) {
#pragma unroll
    for (int i = 0; i < X_TURNS; i++) {
      if (TILE_M % LINES && row + i * LINES >= TILE_M) break;
      bool inside = pixels[i] >= 0;
      cp_async<16>(stage + place(row + i * LINES, piece), inside ? conv.x + pixels[i] + channel : conv.x, inside);
    }
    if constexpr (WEIGHTS) copy_weights(stage, 0);
    k += DEPTH, channel += DEPTH, weight += DEPTH;
    if (channel < conv.Cin) return;
    do {
      channel -= conv.Cin;
      if (++kx == conv.k) kx = 0, ky++;
    } while (channel >= conv.Cin);
    find();
  }
};

// sums += the product of a stage: this warp's PARTS_M × PARTS_N tiles.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[PARTS_M * PARTS_N][4], const T* stage, int warp_m, int warp_n) {
  int lane = threadIdx.x % 32;
  const T* weights = stage + TILE_M * DEPTH;  // TILE_M is a multiple of 8: the swizzle goes on
  unsigned odd[4];  // where PARTS_N is odd, the last tile's b of two steps at once
#pragma unroll
  for (int step = 0; step < DEPTH / 16; step++) {
    unsigned a[PARTS_M][4], b[PARTS_N][2];
#pragma unroll
    for (int i = 0; i < PARTS_M; i++) {
      ldmatrix_x4(a[i], stage + place(warp_m + 16 * i + lane % 16, 2 * step + lane / 16));
    }
#pragma unroll
    for (int j = 0; j + 1 < PARTS_N; j += 2) {
      unsigned r[4];
      ldmatrix_x4(r, weights + place(warp_n + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
    if constexpr (PARTS_N % 2) {
      if (step % 2 == 0) ldmatrix_x4(odd, weights + place(warp_n + 8 * (PARTS_N - 1) + lane % 8, 2 * step + lane / 8));
      b[PARTS_N - 1][0] = odd[step % 2 * 2], b[PARTS_N - 1][1] = odd[step % 2 * 2 + 1];
    }
#pragma unroll
    for (int i = 0; i < PARTS_M; i++) {
#pragma unroll
      for (int j = 0; j < PARTS_N; j++) mma_16x8x16<T>(sums[i * PARTS_N + j], a[i], b[j]);
    }
  }
}

// grid: tiles of N × tiles of M, N fastest; parts of K × phases, parts fastest.
template <class T> __device__ __forceinline__ void convolve(const Conv<T>& conv) {
  T* ring = (T*)dynamic_shared();
  int tiles_n = (conv.rows + TILE_N - 1) / TILE_N, part = blockIdx.y % conv.split, phase = blockIdx.y / conv.split;
  int first_n = blockIdx.x % tiles_n * TILE_N, first_m = blockIdx.x / tiles_n * TILE_M;
  int steps = (conv.K() + DEPTH - 1) / DEPTH;
  int begin = (int)((long long)steps * part / conv.split), end = (int)((long long)steps * (part + 1) / conv.split);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int warp_m = warp / WARPS_N * (TILE_M / WARPS_M), warp_n = warp % WARPS_N * (TILE_N / WARPS_N);

  Loader<T> loader(conv, first_m, first_n, phase, begin);
  // The kernel ahead has no part in the weights: they are on their way before it has ended.
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) loader.copy_weights(ring + i * STAGE, i);
  }
  wait_for_earlier();
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) loader.template next<false>(ring + i * STAGE);
    cp_async_commit();
  }
  float sums[PARTS_M * PARTS_N][4] = {};
  int used = 0, filled = STAGES - 1;
  for (int step = begin; step < end; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // the step is there, and all have left the one before, whose place is filled next
    if (step + STAGES - 1 < end) loader.template next<true>(ring + filled * STAGE);
    cp_async_commit();
    multiply<T>(sums, ring + used * STAGE, warp_m, warp_n);
    used = used + 1 == STAGES ? 0 : used + 1;
    filled = filled + 1 == STAGES ? 0 : filled + 1;
  }
  start_later();

  int tile = phase * gridDim.x + blockIdx.x;
  float* partials = conv.partials + (long long)tile * conv.split * TILE_M * TILE_N;
  int* flag = (int*)(dynamic_shared() + FLAG);
  if (!join_parts<THREADS>(sums, partials, conv.counters + tile, part, conv.split, threadIdx.x, flag,
                           [] { __syncthreads(); })) {
    return;
  }
  __syncthreads();  // nobody reads the ring any more
  float* staged = (float*)ring;
#pragma unroll
  for (int i = 0; i < PARTS_M * PARTS_N; i++) {
    float* to = staged + (warp_m + i / PARTS_N * 16 + lane / 4) * PITCH + warp_n + i % PARTS_N * 8 + lane % 4 * 2;
    *(float2*)to = make_float2(sums[i][0], sums[i][1]);
    *(float2*)(to + 8 * PITCH) = make_float2(sums[i][2], sums[i][3]);
  }
  __syncthreads();
  write_tile<TILE_M, TILE_N, PITCH, THREADS>(conv, staged, first_m, first_n, phase, threadIdx.x);
}

#define KERNEL(NAME, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(CONV_PARAMETERS(T)) { \
    convolve(Conv<T>{CONV_ARGUMENTS});                                                    \
  }

KERNEL(conv2d_mma_f16, f16)
#if __CUDA_ARCH__ >= 800
KERNEL(conv2d_mma_bf16, bf16)
#endif
