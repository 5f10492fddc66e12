// 7 × 7 convolution of stride 1 to few channels on tensor cores, its horizontal taps spread over N.
//
// With 3 channels the product of conv2d.cuh fills 3 of 8 columns of a tensor core's tile, and fetches each pixel 49
// times. Here every position of the image is multiplied with the weights of all horizontal taps, K being (ky, channel)
// alone: z[position, (kx, channel of the result)]. A pixel of the result is then the sum of seven neighbours' z.
//
// A block makes LINES lines of 64 positions. Of 32 channels at a time it holds all LINES + 6 lines of the image that it
// needs, and all weights. Positions beside the image are zeros, so that where the image is as wide as a block all 64 are
// pixels of the result; a wider one is cut in segments of 58.
#include "conv2d.cuh"

#ifndef LINES
#define LINES 4
#endif
#ifndef SPREAD
#define SPREAD 24  // of N, 7 · Cout rounded up to a multiple of 8
#endif

constexpr int TAPS = 7, SPAN = 64, SEGMENT = SPAN - TAPS + 1, DEPTH = 32, PIECES = DEPTH / 8;
constexpr int THREADS = LINES * SPAN;  // as many as positions, 32 of which a warp multiplies
constexpr int IMAGE = (LINES + TAPS - 1) * SPAN, WEIGHTS = TAPS * SPREAD;  // rows of 32 channels in shared memory
constexpr int PARTS_N = SPREAD / 8, PITCH = SPREAD + 1;  // of z; odd, for threads read it a position each
constexpr int EIGHTS = (SPREAD / TAPS + 7) / 8;           // of channels of the result
constexpr int OPERAND_BYTES = 2 * (IMAGE + WEIGHTS) * DEPTH, Z_BYTES = 4 * THREADS * PITCH;
constexpr int FLAG = ((OPERAND_BYTES > Z_BYTES ? OPERAND_BYTES : Z_BYTES) + 15) / 16 * 16;
// Blocks of a multiprocessor. Elsewhere than on sm_90 shared memory holds fewer, or registers for more would spill.
constexpr int BLOCKS = (SPREAD > 24 ? 256 : __CUDA_ARCH__ == 900 ? 768 : 512) / THREADS;

// Where a piece of 8 channels of a row lies: swizzled, so that one piece of 8 rows lies in different banks.
__device__ __forceinline__ int place(int row, int piece) { return row * DEPTH + (piece ^ row / 2 % 4) * 8; }

// Copies 32 channels of the weights, and of the block's part of the image, whose first pixel is that of `window`.
template <class T> __device__ __forceinline__ void load_weights(const Conv<T>& conv, T* image, int channel) {
  int piece = threadIdx.x % PIECES;
  channel += piece * 8;
  bool there = channel < conv.Cin;
#pragma unroll 4
  for (int row = threadIdx.x / PIECES; row < WEIGHTS; row += THREADS / PIECES) {
    int ky = row / SPREAD, n = row % SPREAD;
    const T* from = conv.weight + (n * TAPS + ky) * conv.Cin + channel;
    cp_async<16>(image + place(IMAGE + row, piece), there ? from : conv.weight, there);
  }
}
template <class T>
__device__ __forceinline__ void load_image(const Conv<T>& conv, T* image, Window window, int channel) {
  int piece = threadIdx.x % PIECES;
  channel += piece * 8;
  bool there = channel < conv.Cin;
#pragma unroll 4
  for (int row = threadIdx.x / PIECES; row < IMAGE; row += THREADS / PIECES) {
    int source = source_of(conv, window, row / SPAN, row % SPAN);
    bool inside = there && source >= 0;
    cp_async<16>(image + place(row, piece), inside ? conv.x + source * conv.x_pitch + channel : conv.x, inside);
  }
}

// z += image · weights of this warp's 32 positions.
template <class T> __device__ __forceinline__ void multiply(float (&z)[2 * PARTS_N][4], const T* image) {
  int lane = threadIdx.x % 32, first = threadIdx.x - lane;
#pragma unroll 1
  for (int ky = 0; ky < TAPS; ky++) {
    int pixels = ky * SPAN + first, weights = IMAGE + ky * SPREAD;
    unsigned odd[4];  // where PARTS_N is odd, the last tile's b of both steps
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) {
      unsigned a[2][4], b[PARTS_N][2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4(a[i], image + place(pixels + 16 * i + lane % 16, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j + 1 < PARTS_N; j += 2) {
        unsigned r[4];
        ldmatrix_x4(r, image + place(weights + 8 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
      }
      if constexpr (PARTS_N % 2) {
        if (step == 0) ldmatrix_x4(odd, image + place(weights + 8 * (PARTS_N - 1) + lane % 8, lane / 8));
        b[PARTS_N - 1][0] = odd[2 * step], b[PARTS_N - 1][1] = odd[2 * step + 1];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < PARTS_N; j++) mma_16x8x16<T>(z[i * PARTS_N + j], a[i], b[j]);
      }
    }
  }
}

// grid: segments × groups of LINES lines × images, segments fastest; parts of the channels.
template <class T> __device__ __forceinline__ void convolve(const Conv<T>& conv) {
  T* image = (T*)dynamic_shared();
  bool whole = conv.W <= SPAN && !(conv.flags & REFLECT);
  int segments = whole ? 1 : (conv.Wo + SEGMENT - 1) / SEGMENT, groups = (conv.Ho + LINES - 1) / LINES;
  int segment = blockIdx.x % segments, sample = blockIdx.x / segments / groups;
  int top = blockIdx.x / segments % groups * LINES, left = segment * SEGMENT;  // first pixel of the result
  Window window = {top - conv.padding, whole ? 0 : left - conv.padding, sample * conv.H * conv.W};

  float z[2 * PARTS_N][4] = {};
  int chunks = (conv.Cin + DEPTH - 1) / DEPTH, part = blockIdx.y;
  int begin = chunks * part / conv.split, end = chunks * (part + 1) / conv.split;
  for (int chunk = begin; chunk < end; chunk++) {
    load_weights(conv, image, chunk * DEPTH);
    if (chunk == begin) wait_for_earlier();  // which has no part in the weights
    load_image(conv, image, window, chunk * DEPTH);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    multiply(z, image);
    __syncthreads();  // all have left this chunk
  }
  start_later();

  float* staged = (float*)image;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * PARTS_N; i++) {
    float* to = staged + (threadIdx.x - lane + i / PARTS_N * 16 + lane / 4) * PITCH + i % PARTS_N * 8 + lane % 4 * 2;
    to[0] = z[i][0], to[1] = z[i][1], to[8 * PITCH] = z[i][2], to[8 * PITCH + 1] = z[i][3];
  }
  __syncthreads();
  int y = top + threadIdx.x / SPAN, x = left + threadIdx.x % SPAN;  // this thread's pixel of the result
  int first = x - conv.padding - window.x;                          // its leftmost neighbour among the positions
  const float* line = staged + threadIdx.x / SPAN * SPAN * PITCH;
  float sums[2 * EIGHTS][4] = {};
#pragma unroll
  for (int kx = 0; kx < TAPS; kx++) {
    if ((unsigned)(first + kx) >= SPAN) continue;
    const float* from = line + (first + kx) * PITCH + kx * conv.Cout;
#pragma unroll
    for (int n = 0; n < 8 * EIGHTS; n++) {
      if (n < conv.Cout) sums[n / 4][n % 4] += from[n];
    }
  }
  float* partials = conv.partials + (long long)blockIdx.x * conv.split * 8 * EIGHTS * THREADS;
  if (!join_parts<THREADS>(sums, partials, conv.counters + blockIdx.x, part, conv.split, threadIdx.x,
                           (int*)(dynamic_shared() + FLAG), [] { __syncthreads(); })) {
    return;
  }
  if (y >= conv.Ho || x >= conv.Wo || (!whole && x - left >= SEGMENT)) return;
  long long pixel = ((long long)sample * conv.Ho + y) * conv.Wo + x;
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    if (8 * i >= conv.Cout) break;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = sums[2 * i + j / 4][j % 4];
    finish_8(conv, v, pixel, 8 * i, conv.Cout - 8 * i);
    write_8(conv, v, pixel, 8 * i, conv.Cout - 8 * i);
  }
}

#define KERNEL(NAME, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(CONV_PARAMETERS(T)) { \
    convolve(Conv<T>{CONV_ARGUMENTS});                                                    \
  }

KERNEL(conv2d_spread_f16, f16)
#if __CUDA_ARCH__ >= 800
KERNEL(conv2d_spread_bf16, bf16)
#endif
