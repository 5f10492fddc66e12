// Blur and every step-th pixel, of an image's three channels and a depth, channels-last, with zeros around the image.
//
// A block makes a tile of the result. What of the inputs it takes is staged in shared memory, a float4 a pixel (r, g, b,
// depth); then PARTS neighbouring threads share the taps of a pixel, which they take in turn.
#include "ptx.cuh"
#include "vectors.cuh"

constexpr int THREADS = 256;
constexpr int PARTS = 8;
constexpr int EACH = 5;  // pixels that a thread stages at once: all of a tile of the published networks
constexpr int WIDTH = 8, HEIGHT = THREADS / PARTS / WIDTH;  // of a tile

struct Tap { float weight; int offset; };  // offset: from a window's first pixel, in pixels of the staged tile

// Strides are in elements. D is the depth's dtype.
template <class T, class D>
__device__ __forceinline__ void antialias(const T* image,  // [B, 3 or more, H, W]
                                          long long image_b, long long image_c, long long image_y, long long image_x,
                                          const D* depth,  // [B, 1, H, W], its strides 0 if null: zeros
                                          long long depth_b, long long depth_y, long long depth_x,
                                          const float* weight,  // [n, n]
                                          T* out,               // [B, h, w, 8 of out_stride]
                                          long long out_stride, int H, int W, int h, int w, int n, int step) {
  wait_for_earlier();
  start_later();
  const int width = (WIDTH - 1) * step + n, height = (HEIGHT - 1) * step + n;  // of the staged tile
  float4* staged = (float4*)dynamic_shared();
  Tap* taps = (Tap*)(staged + width * height);
  const long long b = blockIdx.z;
  image += b * image_b;
  const D* far = depth ? depth + b * depth_b : (const D*)image;  // without a depth D is T
  for (int i = threadIdx.x; i < n * n; i += THREADS) taps[i] = {weight[i], i / n * width + i % n};
  const int left = blockIdx.x * WIDTH * step - n / 2, top = blockIdx.y * HEIGHT * step - n / 2;
#pragma unroll 1
  for (int first = threadIdx.x; first < width * height; first += EACH * THREADS) {
    float4 pixel[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int place = first + i * THREADS, x = left + place % width, y = top + place / width;
      bool inside = x >= 0 && x < W && y >= 0 && y < H;
      const T* at = image + (inside ? y * image_y + x * image_x : 0);  // read anyway: no branch, no wait
      float red = to_float(at[0]), green = to_float(at[image_c]), blue = to_float(at[2 * image_c]);
      float away = to_float(far[inside ? y * depth_y + x * depth_x : 0]);
      pixel[i] = inside ? make_float4(red, green, blue, depth ? away : 0.f) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (first + i * THREADS < width * height) staged[first + i * THREADS] = pixel[i];
    }
  }
  __syncthreads();

  const int part = threadIdx.x % PARTS, column = threadIdx.x / PARTS % WIDTH, row = threadIdx.x / (PARTS * WIDTH);
  const float4* window = staged + row * step * width + column * step;
  float sum[4] = {};
#pragma unroll 4
  for (int i = part; i < n * n; i += PARTS) {
    Tap tap = taps[i];
    float4 pixel = window[tap.offset];
    sum[0] = fmaf(tap.weight, pixel.x, sum[0]);
    sum[1] = fmaf(tap.weight, pixel.y, sum[1]);
    sum[2] = fmaf(tap.weight, pixel.z, sum[2]);
    sum[3] = fmaf(tap.weight, pixel.w, sum[3]);
  }
#pragma unroll
  for (int distance = PARTS / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int c = 0; c < 4; c++) sum[c] += __shfl_xor_sync(~0u, sum[c], distance);
  }
  const int x = blockIdx.x * WIDTH + column, y = blockIdx.y * HEIGHT + row;
  if (part > 0 || x >= w || y >= h) return;
  T* target = out + ((b * h + y) * w + x) * out_stride;
  float value[8] = {sum[0], sum[1], sum[2], sum[3]};
#pragma unroll
  for (int first = 0; first < 8; first += VALUES<T>) {
    float some[VALUES<T>];
#pragma unroll
    for (int i = 0; i < VALUES<T>; i++) some[i] = value[first + i];
    store_values(target + first, some);
  }
}

#define ANTIALIAS(T, NAME, D, DEPTH)  \
  extern "C" __global__ void __launch_bounds__(THREADS) antialias_##NAME##_##DEPTH(  \
      const T* image, long long image_b, long long image_c, long long image_y, long long image_x, const D* depth,  \
      long long depth_b, long long depth_y, long long depth_x, const float* weight, T* out, long long out_stride,  \
      int H, int W, int h, int w, int n, int step) {  \
    antialias<T, D>(image, image_b, image_c, image_y, image_x, depth, depth_b, depth_y, depth_x, weight, out,  \
                    out_stride, H, W, h, w, n, step);  \
  }

ANTIALIAS(float, f32, float, f32)
ANTIALIAS(f16, f16, f16, f16)
ANTIALIAS(f16, f16, float, f32)
ANTIALIAS(bf16, bf16, bf16, bf16)
ANTIALIAS(bf16, bf16, float, f32)
