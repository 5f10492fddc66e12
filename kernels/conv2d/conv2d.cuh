// What the convolution kernels share: their arguments, how rows of the product are pixels, joining of parts of K, and
// everything that happens to the sums before they are written.
//
// A convolution is the product [M, K] [K, N]: M its pixels, K = (ky, kx, channel) and N the channels of the result.
// Nothing of [M, K] is ever stored: a kernel gathers its rows from the image.
#pragma once

#include "ptx.cuh"

// Bits of `flags`; as in dagan_rt/kernels/conv2d.py.
constexpr int REFLECT = 1;         // the image is continued by reflection, not by zeros
constexpr int RELU = 1 << 1;       // bits 1 and 2 are the activation
constexpr int ELU = 2 << 1;
constexpr int SIGMOID = 3 << 1;
constexpr int ACTIVATION = 3 << 1;
constexpr int POOL = 1 << 3;       // 2 × 2 pixels are averaged
constexpr int REPEAT = 1 << 4;     // a pixel is written 2 × 2 times
constexpr int UPSAMPLE = 1 << 5;   // four products of 2 × 2 taps: phase (py, px) makes the pixels (2 y + py, 2 x + px)
constexpr int NEAREST = 1 << 6;    // the image is read as if each of its pixels were 2 × 2
constexpr int FLOAT_OUT = 1 << 7;  // `out` and `second` are float, else T
constexpr int BYTE_OUT = 2 << 7;   // `out` is bytes
constexpr int VECTORS = 1 << 9;    // 8 channels of `out`, `second` and `residual` can be moved at once

template <class T> struct Conv {
  const T* x;             // [B, H, W, Cin], a pixel every x_pitch
  const T* weight;        // [phases, rows, K]
  const float* bias;      // [rows]
  const T* residual;      // like out, or null
  void* out;              // [B, pixels, Cout], a pixel every out_pitch
  void* second;           // relu(out · scale + shift), or null
  const float *scale, *shift;
  float* partials;        // [tiles][split][fields][threads] of join_parts; null if split is 1
  unsigned* counters;     // [tiles], zeros before and after; null if split is 1
  int B, H, W, Cin, x_pitch;
  int Ho, Wo;             // of the pixels that M walks over: before pooling and repeating, and of one phase
  int Cout, rows;         // rows: Cout rounded up to a multiple of 8
  int out_pitch, second_pitch, residual_pitch;
  int k, stride, padding, split, flags;  // padding is that of phase (0, 0)

  __device__ __forceinline__ int M() const { return B * Ho * Wo; }
  __device__ __forceinline__ int K() const { return k * k * Cin; }
};

#define CONV_PARAMETERS(T)                                                                                           \
  const T *x, const T *weight, const float *bias, const T *residual, void *out, void *second, const float *scale,    \
      const float *shift, float *partials, unsigned *counters, int B, int H, int W, int Cin, int x_pitch, int Ho,     \
      int Wo, int Cout, int rows, int out_pitch, int second_pitch, int residual_pitch, int k, int stride, int padding, \
      int split, int flags
#define CONV_ARGUMENTS                                                                                              \
  x, weight, bias, residual, out, second, scale, shift, partials, counters, B, H, W, Cin, x_pitch, Ho, Wo, Cout, rows, \
      out_pitch, second_pitch, residual_pitch, k, stride, padding, split, flags

// ---- M: rows of the product are pixels; with POOL the four that are averaged follow each other ----
struct Pixel {
  int b, y, x;
};
template <class T> __device__ __forceinline__ Pixel pixel_of(const Conv<T>& conv, int m) {
  unsigned inner = 0, width = conv.Wo, height = conv.Ho, at = m;
  if (conv.flags & POOL) {
    inner = at % 4, at /= 4, width /= 2, height /= 2;
  }
  unsigned line = at / width, x = at % width, b = line / height, y = line % height;
  if (conv.flags & POOL) return {(int)b, (int)(2 * y + inner / 2), (int)(2 * x + inner % 2)};
  return {(int)b, (int)y, (int)x};
}

// One row of the product, as a loader of x keeps it.
struct Window {
  int y, x;   // of tap (0, 0) in the image, perhaps outside
  int image;  // index of the image's first pixel; -1: a row beyond M, all zeros
};
template <class T> __device__ __forceinline__ Window window_of(const Conv<T>& conv, int m, int phase) {
  if (m >= conv.M()) return {0, 0, -1};
  Pixel at = pixel_of(conv, m);
  return {at.y * conv.stride - conv.padding + phase / 2, at.x * conv.stride - conv.padding + phase % 2,
          at.b * conv.H * conv.W};
}

// Index of the pixel that a tap of a window reads, counted over all images; -1 where it is zero.
template <class T> __device__ __forceinline__ int source_of(const Conv<T>& conv, Window window, int ky, int kx) {
  int nearest = conv.flags & NEAREST ? 1 : 0, height = conv.H << nearest, width = conv.W << nearest;
  int y = window.y + ky, x = window.x + kx;
  if (conv.flags & REFLECT) {
    y = y < 0 ? -y : y, x = x < 0 ? -x : x;
    y = y >= height ? 2 * height - 2 - y : y, x = x >= width ? 2 * width - 2 - x : x;
    y = min(max(y, 0), height - 1), x = min(max(x, 0), width - 1);  // a length of 1 has nothing to reflect
  } else if ((unsigned)y >= (unsigned)height || (unsigned)x >= (unsigned)width) {
    return -1;
  }
  if (window.image < 0) return -1;
  return window.image + (y >> nearest) * conv.W + (x >> nearest);
}

// ---- parts of K ----
// Adds up what `split` blocks found for one tile, in the block that comes last; true there, and everywhere if there is
// one part only. The order of summation does not depend on the order of arrival. All THREADS threads of the block that
// hold sums call it, `thread` counting them; `flag` is a place in shared memory that nobody else uses meanwhile.
// partials: [split][GROUPS][THREADS] × 4 floats of this tile. counter: of this tile. sync(): a barrier of the THREADS.
template <int THREADS, int GROUPS, class Sync>
__device__ __forceinline__ bool join_parts(float (&sums)[GROUPS][4], float* partials, unsigned* counter, int part,
                                           int split, int thread, int* flag, Sync sync) {
  if (split == 1) return true;
  float4* mine = (float4*)partials + (long long)part * GROUPS * THREADS + thread;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) mine[i * THREADS] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  sync();  // all have written their part
  if (thread == 0) *flag = count_up(counter) == (unsigned)split - 1;
  sync();
  if (!*flag) return false;
  if (thread == 0) *counter = 0;

  const float4* parts = (const float4*)partials + thread;
#pragma unroll
  for (int i = 0; i < GROUPS; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
  constexpr int AT_ONCE = GROUPS >= 16 ? 1 : 16 / GROUPS;  // parts to fetch: few would wait, many need registers
#pragma unroll AT_ONCE
  for (int other = 0; other < split; other++, parts += GROUPS * THREADS) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      float4 part_of = parts[i * THREADS];
      sums[i][0] += part_of.x, sums[i][1] += part_of.y, sums[i][2] += part_of.z, sums[i][3] += part_of.w;
    }
  }
  return true;
}

// ---- what happens to the sums ----
__device__ __forceinline__ float activated(float value, int activation) {
  constexpr float LOG2_E = 1.44269504f;
  if (activation == RELU) return value < 0 ? 0 : value;  // NaN stays
  if (activation == ELU) return value > 0 ? value : exp2_fast(value * LOG2_E) - 1;
  if (activation == SIGMOID) return __fdividef(1, 1 + exp2_fast(-value * LOG2_E));
  return value;
}

// Eight channels of one pixel in memory, of which `count` are there.
template <class T>
__device__ __forceinline__ void store_8(void* to, long long at, const float (&v)[8], int count, int flags) {
  bool whole = count >= 8 && flags & VECTORS;
  if (flags & BYTE_OUT) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < count) ((u8*)to)[at + i] = (u8)__float2int_rn(__saturatef(v[i]) * 255);
    }
  } else if (flags & FLOAT_OUT) {
    float* place = (float*)to + at;
    if (whole) {
      ((float4*)place)[0] = make_float4(v[0], v[1], v[2], v[3]);
      ((float4*)place)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i < count) place[i] = v[i];
      }
    }
  } else {
    T* place = (T*)to + at;
    if (whole) {
      *(uint4*)place = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i < count) place[i] = from_float<T>(v[i]);
      }
    }
  }
}

// += the bias and the residual of eight channels from n on, then the activation.
template <class T>
__device__ __forceinline__ void finish_8(const Conv<T>& conv, float (&v)[8], long long pixel, int n, int count) {
  float4 low = ((const float4*)(conv.bias + n))[0], high = ((const float4*)(conv.bias + n))[1];
  v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
  v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
  if (conv.residual) {
    const T* from = conv.residual + pixel * conv.residual_pitch + n;
    if (count >= 8 && conv.flags & VECTORS) {
      uint4 r = *(const uint4*)from;
      unsigned words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += i % 2 ? high_half<T>(words[i / 2]) : low_half<T>(words[i / 2]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i < count) v[i] += to_float(from[i]);
      }
    }
  }
  int activation = conv.flags & ACTIVATION;
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = activated(v[i], activation);
}

// Writes eight channels from n on to `out` and, normalized, to `second`.
template <class T>
__device__ __forceinline__ void write_8(const Conv<T>& conv, const float (&v)[8], long long pixel, int n, int count) {
  store_8<T>(conv.out, pixel * conv.out_pitch + n, v, count, conv.flags);
  if (conv.second) {
    float normalized[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      normalized[i] = i < count ? activated(fmaf(v[i], conv.scale[n + i], conv.shift[n + i]), RELU) : 0;
    }
    store_8<T>(conv.second, pixel * conv.second_pitch + n, normalized, count, conv.flags);
  }
}

// Writes ROWS pixels from first_m on (a multiple of 4) × COLUMNS channels from first_n on, whose sums lie in shared
// memory, [ROWS][PITCH] floats, PITCH and COLUMNS multiples of 4 and 8. `thread` of THREADS; all have met at a barrier.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ void write_tile(const Conv<T>& conv, const float* staged, int first_m, int first_n,
                                           int phase, int thread) {
  constexpr int EIGHTS = COLUMNS / 8;
  int pooled = conv.flags & POOL ? 4 : 1, M = conv.M();
  for (int i = thread; i < ROWS / pooled * EIGHTS; i += THREADS) {
    int row = i / EIGHTS * pooled, m = first_m + row, n = first_n + i % EIGHTS * 8, count = conv.Cout - n;
    if (m >= M || count <= 0) continue;
    const float* from = staged + row * PITCH + i % EIGHTS * 8;
    auto finished = [&](const float* from, long long pixel, float (&v)[8]) {
      float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
      v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
      v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
      finish_8(conv, v, pixel, n, count);
    };
    float v[8];
    if (pooled == 4) {
      float sum[8] = {};
#pragma unroll 1
      for (int quarter = 0; quarter < 4; quarter++) {
        finished(from + quarter * PITCH, 0, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += 0.25f * v[j];
      }
      write_8(conv, sum, m / 4, n, count);
    } else if (conv.flags & (REPEAT | UPSAMPLE)) {
      Pixel at = pixel_of(conv, m);
      long long pixel = ((long long)at.b * conv.Ho + at.y) * 4 * conv.Wo + 2 * at.x;  // of the doubled map
      int width = 2 * conv.Wo;
      if (conv.flags & UPSAMPLE) {
        pixel += phase / 2 * width + phase % 2;
        finished(from, pixel, v);
        write_8(conv, v, pixel, n, count);
      } else {
        finished(from, 0, v);  // no residual
#pragma unroll 1
        for (int copy = 0; copy < 4; copy++) write_8(conv, v, pixel + copy / 2 * width + copy % 2, n, count);
      }
    } else {
      finished(from, m, v);
      write_8(conv, v, m, n, count);
    }
  }
}
