// Convolution of maps with few channels on tensor cores, from a patch in shared memory.
//
// With few channels the product of conv2d.cuh has little to do for each value that it fetches, and fetches every pixel
// once a tap. Here a block brings in the pixels that its tile of the result needs, once, and takes all taps from there:
// a row of a matrix is eight channels of a pixel, and where the rows lie is free. All weights of as many channels lie
// beside it; of more channels CHUNK are done at a time, and parts of K are chunks.
//
// K is (tap, channel) in eights; a table says where each lies in the patch. Pixels in the patch and rows of the weights
// are an odd number of eights apart, so that eight successive ones lie in different banks.
#include "conv2d.cuh"

#ifndef TILE_N
#define TILE_N 32  // of N, a multiple of 8
#endif
#ifndef LINES
#define LINES 2  // of 16 pixels of the result, of each warp
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS, WIDTH = 16, HEIGHT = WARPS * LINES;
constexpr int PARTS_N = TILE_N / 8, PITCH = TILE_N + 4;  // of the sums that a warp stages

struct Shape {
  int height, width, pixel;  // of the patch, and eights from a pixel of it to the next
  int eights, row;           // of K in a chunk, and from a row of the weights to the next
  __device__ __forceinline__ Shape(int k, int stride, int chunk) {
    height = (HEIGHT - 1) * stride + k, width = (WIDTH - 1) * stride + k, pixel = chunk / 8 | 1;
    eights = k * k * (chunk / 8), row = (eights + 1) / 2 * 2 + 1;
  }
  __device__ __forceinline__ int zeros() const { return height * width * pixel; }  // where an eight of zeros lies
};

// Copies the weights of the channels from `channel` on; those of a last odd eight of K are zeros.
template <class T>
__device__ __forceinline__ void load_weights(const Conv<T>& conv, uint4* to, Shape shape, int chunk, int channel) {
  int of_tap = chunk / 8;
  for (int i = threadIdx.x; i < TILE_N * (shape.row - 1); i += THREADS) {
    int n = i / (shape.row - 1), eight = i % (shape.row - 1), tap = eight / of_tap;
    bool inside = n < conv.rows && eight < shape.eights;
    const T* from = conv.weight + (long long)n * conv.K() + tap * conv.Cin + channel + eight % of_tap * 8;
    cp_async<16>(to + n * shape.row + eight, inside ? from : conv.weight, inside);
  }
}

template <class T>
__device__ __forceinline__ void load_patch(const Conv<T>& conv, uint4* to, Shape shape, int chunk, int channel,
                                           Window window) {
  int of_pixel = chunk / 8;
  for (int i = threadIdx.x; i < shape.height * shape.width * of_pixel; i += THREADS) {
    int pixel = i / of_pixel, eight = i % of_pixel;
    int source = source_of(conv, window, pixel / shape.width, pixel % shape.width);
    const T* from = conv.x + (long long)source * conv.x_pitch + channel + eight * 8;
    cp_async<16>(to + pixel * shape.pixel + eight, source >= 0 ? from : conv.x, source >= 0);
  }
}

// sums += patch · weights: this warp's lines × all TILE_N channels.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[LINES * PARTS_N][4], const uint4* patch, const uint4* weights,
                                         const int* table, Shape shape, int stride) {
  int lane = threadIdx.x % 32, line = threadIdx.x / 32 * LINES;
  const uint4* pixel = patch + (line * stride * shape.width + lane % 16 * stride) * shape.pixel;
  const uint4* of_b = weights + (lane / 16 * 8 + lane % 8) * shape.row + lane / 8 % 2;  // two tiles of N at once
  const uint4* of_odd = weights + (8 * (PARTS_N - 1) + lane % 8) * shape.row + lane / 8 % 2;
  int steps = shape.row / 2, down = stride * shape.width * shape.pixel;
#pragma unroll 2
  for (int step = 0; step < steps; step++) {
    int offset = table[2 * step + lane / 16];
    unsigned a[LINES][4], b[PARTS_N][2];
#pragma unroll
    for (int i = 0; i < LINES; i++) {
      // Zeros lie at one place, whatever the pixel.
      const uint4* from = offset < shape.zeros() ? pixel + i * down + offset : patch + offset;
      ldmatrix_x4(a[i], from);
    }
#pragma unroll
    for (int j = 0; j + 1 < PARTS_N; j += 2) {
      unsigned r[4];
      ldmatrix_x4(r, of_b + 8 * j * shape.row + 2 * step);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
    if constexpr (PARTS_N % 2) {
      unsigned r[4];  // the upper half is read twice
      ldmatrix_x4(r, of_odd + 2 * step);
      b[PARTS_N - 1][0] = r[0], b[PARTS_N - 1][1] = r[1];
    }
#pragma unroll
    for (int i = 0; i < LINES; i++) {
#pragma unroll
      for (int j = 0; j < PARTS_N; j++) mma_16x8x16<T>(sums[i * PARTS_N + j], a[i], b[j]);
    }
  }
}

// Writes a line of 16 pixels × TILE_N channels from the sums of a warp, through its own part of shared memory.
template <class T>
__device__ __forceinline__ void write_line(const Conv<T>& conv, const float (*sums)[4], float* staged, int image, int y,
                                           int x) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < PARTS_N; j++) {
    float* to = staged + lane / 4 * PITCH + j * 8 + lane % 4 * 2;
    to[0] = sums[j][0], to[1] = sums[j][1], to[8 * PITCH] = sums[j][2], to[8 * PITCH + 1] = sums[j][3];
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 16 * PARTS_N; i += 32) {
    int column = i / PARTS_N, n = i % PARTS_N * 8, count = conv.Cout - n;
    if (y >= conv.Ho || x + column >= conv.Wo || count <= 0) continue;
    const float* from = staged + column * PITCH + n;
    float v[8] = {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
    long long line = (long long)image * conv.Ho + y;
    if (conv.flags & REPEAT) {
      finish_8(conv, v, 0, n, count);  // no residual
      long long pixel = line * 4 * conv.Wo + 2 * (x + column);
#pragma unroll 1
      for (int copy = 0; copy < 4; copy++) write_8(conv, v, pixel + copy / 2 * 2 * conv.Wo + copy % 2, n, count);
    } else {
      finish_8(conv, v, line * conv.Wo + x + column, n, count);
      write_8(conv, v, line * conv.Wo + x + column, n, count);
    }
  }
  __syncwarp();
}

// grid: tiles of 16 columns × tiles of HEIGHT lines × images, columns fastest; parts of the chunks.
// Bits 16 and above of `flags` are the channels of a chunk.
template <class T> __device__ __forceinline__ void convolve(const Conv<T>& conv) {
  int chunk = conv.flags >> 16;
  Shape shape(conv.k, conv.stride, chunk);
  uint4* patch = (uint4*)dynamic_shared();
  uint4* weights = patch + shape.zeros() + 1;
  int* table = (int*)(weights + TILE_N * shape.row);
  int staging = WARPS * 16 * PITCH, used = 4 * (shape.zeros() + 1 + TILE_N * shape.row) + shape.row - 1;
  int* flag = (int*)dynamic_shared() + (used > staging ? used : staging);

  int across = (conv.Wo + WIDTH - 1) / WIDTH, down = (conv.Ho + HEIGHT - 1) / HEIGHT;
  int x = blockIdx.x % across * WIDTH, y = blockIdx.x / across % down * HEIGHT, image = blockIdx.x / across / down;
  Window window = {y * conv.stride - conv.padding, x * conv.stride - conv.padding, image * conv.H * conv.W};
  int chunks = conv.Cin / chunk, part = blockIdx.y;
  int begin = chunks * part / conv.split, end = chunks * (part + 1) / conv.split;

  for (int i = threadIdx.x; i < shape.row - 1; i += THREADS) {
    int tap = i / (chunk / 8);
    table[i] = i < shape.eights ? (tap / conv.k * shape.width + tap % conv.k) * shape.pixel + i % (chunk / 8)
                                : shape.zeros();
  }
  if (threadIdx.x == 0) patch[shape.zeros()] = make_uint4(0, 0, 0, 0);
  float sums[LINES * PARTS_N][4] = {};
  for (int at = begin; at < end; at++) {
    load_weights(conv, weights, shape, chunk, at * chunk);
    if (at == begin) wait_for_earlier();
    load_patch(conv, patch, shape, chunk, at * chunk, window);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (at + 1 == end) start_later();
    multiply<T>(sums, patch, weights, table, shape, conv.stride);
    __syncthreads();  // all have left this chunk
  }

  float* partials = conv.partials + (long long)blockIdx.x * conv.split * 4 * LINES * PARTS_N * THREADS;
  if (!join_parts<THREADS>(sums, partials, conv.counters + blockIdx.x, part, conv.split, threadIdx.x, flag,
                           [] { __syncthreads(); })) {
    return;
  }
  int warp = threadIdx.x / 32;
  float* staged = (float*)patch + warp * 16 * PITCH;
#pragma unroll
  for (int i = 0; i < LINES; i++) {
    write_line(conv, sums + i * PARTS_N, staged, image, y + warp * LINES + i, x);
  }
}

#define KERNEL(NAME, T)                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(CONV_PARAMETERS(T)) { \
    convolve(Conv<T>{CONV_ARGUMENTS});                                               \
  }

KERNEL(conv2d_patch_f16, f16)
#if __CUDA_ARCH__ >= 800
KERNEL(conv2d_patch_bf16, bf16)
#endif
