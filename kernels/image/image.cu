// Interleaved uint8 images to planes of T in [0, 1], and back, and to features of 8 channels. README.md lists the
// versions of the former.
//   …_nchw  4 (float) or 8 (16 bits) pixels a thread, 16 bytes of each plane; the bytes of a block pass through
//           shared memory, so that the accesses of a warp are contiguous on both sides
//   …_nhwc  both sides have one order: 16 bytes of T a thread
//   …_any   one pixel a thread, whatever the strides and the alignment
#include "types.cuh"
#include "vectors.cuh"

constexpr int THREADS = 256;
template <class T> constexpr int BYTES = VALUES<T> / 4;  // words that as many bytes as values fill, moved at once too

// One or two words in one instruction, aligned to their size.
template <int COUNT> __device__ __forceinline__ void load(unsigned* words, const void* place) {
  if constexpr (COUNT == 1) {
    words[0] = *(const unsigned*)place;
  } else {
    uint2 pair = *(const uint2*)place;
    words[0] = pair.x, words[1] = pair.y;
  }
}
template <int COUNT> __device__ __forceinline__ void store(void* place, const unsigned* words) {
  if constexpr (COUNT == 1) {
    *(unsigned*)place = words[0];
  } else {
    *(uint2*)place = make_uint2(words[0], words[1]);
  }
}

// value / 255, rounded correctly (a product with 1 / 255 is off by an ulp for some): one Newton step on the quotient.
__device__ __forceinline__ float from_level(unsigned level) {
  float value = (float)level, quotient = value * (1.f / 255.f);
  return fmaf(fmaf(-255.f, quotient, value), 1.f / 255.f, quotient);
}

// Nearest of 256 levels, ties to even. fmaxf makes 0 of NaN.
__device__ __forceinline__ unsigned to_level(float value, int sigmoid) {
  if (sigmoid) value = 1.f / (1.f + expf(-value));
  return (unsigned)__float2int_rn(fminf(fmaxf(value, 0.f), 1.f) * 255.f);
}

// Byte n of `words`.
__device__ __forceinline__ unsigned byte(const unsigned* words, int n) { return words[n / 4] >> 8 * (n % 4) & 255; }

// What a block of the _nchw kernels works on: `groups` runs of VALUES pixels from pixel `first` of image `batch` on.
struct Share { long long batch, first; int groups; };
template <class T> __device__ __forceinline__ Share share_of_block(long long pixels, int blocks) {
  long long first = (long long)(blockIdx.x % blocks) * THREADS;  // in groups
  long long left = pixels / VALUES<T> - first;
  return {blockIdx.x / blocks, first * VALUES<T>, left < THREADS ? (int)left : THREADS};
}

template <class T>
__device__ __forceinline__ void image_to_planes_nchw(const u8* __restrict__ image,  // [B, H·W, 3]
                                                     T* __restrict__ planes,        // [B, 3, H·W]
                                                     long long pixels,              // H·W, a multiple of VALUES
                                                     int blocks) {                  // for each image
  __shared__ uint2 staged[3 * THREADS];
  unsigned* bytes = (unsigned*)staged;  // BYTES words at a time
  Share share = share_of_block<T>(pixels, blocks);
  const unsigned* source = (const unsigned*)(image + 3 * (share.batch * pixels + share.first));
  unsigned words[3 * BYTES<T>];
#pragma unroll
  for (int j = 0; j < 3; j++) {
    int i = j * THREADS + threadIdx.x;
    if (i < 3 * share.groups) load<BYTES<T>>(words + j * BYTES<T>, source + i * BYTES<T>);
  }
#pragma unroll
  for (int j = 0; j < 3; j++) store<BYTES<T>>(bytes + (j * THREADS + threadIdx.x) * BYTES<T>, words + j * BYTES<T>);
  __syncthreads();
  if ((int)threadIdx.x >= share.groups) return;

#pragma unroll
  for (int j = 0; j < 3; j++) load<BYTES<T>>(words + j * BYTES<T>, bytes + (3 * threadIdx.x + j) * BYTES<T>);
  T* target = planes + 3 * share.batch * pixels + share.first + threadIdx.x * VALUES<T>;
#pragma unroll
  for (int c = 0; c < 3; c++) {
    float value[VALUES<T>];
#pragma unroll
    for (int i = 0; i < VALUES<T>; i++) value[i] = from_level(byte(words, 3 * i + c));
    store_values(target + c * pixels, value);
  }
}

template <class T>
__device__ __forceinline__ void planes_to_image_nchw(const T* __restrict__ planes,  // [B, 3, H·W]
                                                     u8* __restrict__ image,        // [B, H·W, 3]
                                                     long long pixels,              // H·W, a multiple of VALUES
                                                     int blocks,                    // for each image
                                                     int sigmoid) {
  __shared__ uint2 staged[3 * THREADS];
  unsigned* bytes = (unsigned*)staged;  // BYTES words at a time
  Share share = share_of_block<T>(pixels, blocks);
  if ((int)threadIdx.x < share.groups) {
    const T* source = planes + 3 * share.batch * pixels + share.first + threadIdx.x * VALUES<T>;
    float value[3][VALUES<T>];
#pragma unroll
    for (int c = 0; c < 3; c++) load_values(value[c], source + c * pixels);
    unsigned words[3 * BYTES<T>] = {};
#pragma unroll
    for (int n = 0; n < 3 * VALUES<T>; n++) words[n / 4] |= to_level(value[n % 3][n / 3], sigmoid) << 8 * (n % 4);
#pragma unroll
    for (int j = 0; j < 3; j++) store<BYTES<T>>(bytes + (3 * threadIdx.x + j) * BYTES<T>, words + j * BYTES<T>);
  }
  __syncthreads();
  unsigned* target = (unsigned*)(image + 3 * (share.batch * pixels + share.first));
#pragma unroll
  for (int j = 0; j < 3; j++) {
    int i = j * THREADS + threadIdx.x;
    unsigned words[BYTES<T>];
    load<BYTES<T>>(words, bytes + i * BYTES<T>);
    if (i < 3 * share.groups) store<BYTES<T>>(target + i * BYTES<T>, words);
  }
}

template <class T>
__device__ __forceinline__ void image_to_planes_nhwc(const u8* __restrict__ image,  // [values]
                                                     T* __restrict__ planes,        // [values]
                                                     long long groups) {            // values / VALUES
  long long group = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (group >= groups) return;
  unsigned words[BYTES<T>];
  load<BYTES<T>>(words, image + group * VALUES<T>);
  float value[VALUES<T>];
#pragma unroll
  for (int i = 0; i < VALUES<T>; i++) value[i] = from_level(byte(words, i));
  store_values(planes + group * VALUES<T>, value);
}

template <class T>
__device__ __forceinline__ void planes_to_image_nhwc(const T* __restrict__ planes,  // [values]
                                                     u8* __restrict__ image,        // [values]
                                                     long long groups,              // values / VALUES
                                                     int sigmoid) {
  long long group = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (group >= groups) return;
  float value[VALUES<T>];
  load_values(value, planes + group * VALUES<T>);
  unsigned words[BYTES<T>] = {};
#pragma unroll
  for (int i = 0; i < VALUES<T>; i++) words[i / 4] |= to_level(value[i], sigmoid) << 8 * (i % 4);
  store<BYTES<T>>(image + group * VALUES<T>, words);
}

// Strides are in elements.
template <class T>
__device__ __forceinline__ void image_to_planes_any(const u8* __restrict__ image,  // [B, H, W, 3]
                                                    long long image_b, long long image_y, long long image_x,
                                                    long long image_c,
                                                    T* __restrict__ planes,  // [B, 3, H, W]
                                                    long long planes_b, long long planes_c, long long planes_y,
                                                    long long planes_x, long long pixels, int H, int W) {
  long long pixel = (long long)blockIdx.x * THREADS + threadIdx.x;  // of all B·H·W
  if (pixel >= pixels) return;
  long long x = pixel % W, y = pixel / W % H, b = pixel / W / H;
#pragma unroll
  for (int c = 0; c < 3; c++) {
    u8 level = image[b * image_b + y * image_y + x * image_x + c * image_c];
    planes[b * planes_b + c * planes_c + y * planes_y + x * planes_x] = from_float<T>(from_level(level));
  }
}

template <class T>
__device__ __forceinline__ void planes_to_image_any(const T* __restrict__ planes,  // [B, 3, H, W]
                                                    long long planes_b, long long planes_c, long long planes_y,
                                                    long long planes_x,
                                                    u8* __restrict__ image,  // [B, H, W, 3]
                                                    long long image_b, long long image_y, long long image_x,
                                                    long long image_c, long long pixels, int H, int W, int sigmoid) {
  long long pixel = (long long)blockIdx.x * THREADS + threadIdx.x;  // of all B·H·W
  if (pixel >= pixels) return;
  long long x = pixel % W, y = pixel / W % H, b = pixel / W / H;
#pragma unroll
  for (int c = 0; c < 3; c++) {
    float value = to_float(planes[b * planes_b + c * planes_c + y * planes_y + x * planes_x]);
    image[b * image_b + y * image_y + x * image_x + c * image_c] = (u8)to_level(value, sigmoid);
  }
}

// A pixel a thread: r, g, b in [0, 1], 1, and four zeros, in one store of 16 bytes where T has 16 bits.
template <class T>
__device__ __forceinline__ void image_to_features(const u8* image,  // [B, H, W, 3], of the strides below
                                                  long long image_b, long long image_y, long long image_x,
                                                  long long image_c,
                                                  T* features,  // [B, H, W, 8 of pixel_stride]
                                                  long long pixel_stride, int pixels, int W) {
  wait_for_earlier();
  start_later();
  int pixel = blockIdx.x * THREADS + threadIdx.x;  // of H·W
  if (pixel >= pixels) return;
  image += blockIdx.y * image_b + (pixel / W) * image_y + (pixel % W) * image_x;
  T* target = features + ((long long)blockIdx.y * pixels + pixel) * pixel_stride;
  float value[8] = {from_level(image[0]), from_level(image[image_c]), from_level(image[2 * image_c]), 1.f};
#pragma unroll
  for (int first = 0; first < 8; first += VALUES<T>) {
    float part[VALUES<T>];
#pragma unroll
    for (int i = 0; i < VALUES<T>; i++) part[i] = value[first + i];
    store_values(target + first, part);
  }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define IMAGE_KERNELS(T, NAME)  \
  KERNEL image_to_planes_##NAME##_nchw(const u8* image, T* planes, long long pixels, int blocks) {  \
    image_to_planes_nchw<T>(image, planes, pixels, blocks);  \
  }  \
  KERNEL image_to_planes_##NAME##_nhwc(const u8* image, T* planes, long long groups) {  \
    image_to_planes_nhwc<T>(image, planes, groups);  \
  }  \
  KERNEL image_to_planes_##NAME##_any(const u8* image, long long image_b, long long image_y, long long image_x,  \
                                      long long image_c, T* planes, long long planes_b, long long planes_c,  \
                                      long long planes_y, long long planes_x, long long pixels, int H, int W) {  \
    image_to_planes_any<T>(image, image_b, image_y, image_x, image_c, planes, planes_b, planes_c, planes_y, planes_x,  \
                           pixels, H, W);  \
  }  \
  KERNEL planes_to_image_##NAME##_nchw(const T* planes, u8* image, long long pixels, int blocks, int sigmoid) {  \
    planes_to_image_nchw<T>(planes, image, pixels, blocks, sigmoid);  \
  }  \
  KERNEL planes_to_image_##NAME##_nhwc(const T* planes, u8* image, long long groups, int sigmoid) {  \
    planes_to_image_nhwc<T>(planes, image, groups, sigmoid);  \
  }  \
  KERNEL planes_to_image_##NAME##_any(const T* planes, long long planes_b, long long planes_c, long long planes_y,  \
                                      long long planes_x, u8* image, long long image_b, long long image_y,  \
                                      long long image_x, long long image_c, long long pixels, int H, int W,  \
                                      int sigmoid) {  \
    planes_to_image_any<T>(planes, planes_b, planes_c, planes_y, planes_x, image, image_b, image_y, image_x, image_c,  \
                           pixels, H, W, sigmoid);  \
  }  \
  KERNEL image_to_features_##NAME(const u8* image, long long image_b, long long image_y, long long image_x,  \
                                  long long image_c, T* features, long long pixel_stride, int pixels, int W) {  \
    image_to_features<T>(image, image_b, image_y, image_x, image_c, features, pixel_stride, pixels, W);  \
  }

IMAGE_KERNELS(float, f32)
IMAGE_KERNELS(f16, f16)
IMAGE_KERNELS(bf16, bf16)
