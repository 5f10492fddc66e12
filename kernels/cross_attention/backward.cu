// What surrounds the two passes of the backward of out = gamma · attended + residual, attended = V softmax(QᵀK)ᵀ:
// delta and d gamma before them, the sum over their splits after them.
#include "types.cuh"

// ---- delta[i] = Σ_c grad[c, i] attended[c, i], and the block's share of d gamma = Σ_i delta[i] ----
constexpr int DELTA_PIXELS = 32, DELTA_GROUPS = 8;  // of a block; a group of channels is every eighth

template <class T>
__device__ void delta_of_block(const T* __restrict__ grad,      // [B, C, N], as are the strides
                               const T* __restrict__ attended,  // [B, C, N]
                               float* __restrict__ delta,       // [B, N]
                               float* __restrict__ shares,      // [gridDim.y, gridDim.x]
                               int channels, int pixels, int channel_stride, int pixel_stride) {
  __shared__ float sums[DELTA_GROUPS][DELTA_PIXELS + 1];
  // Neighbouring threads read neighbouring elements: of a channel, or of a pixel where its channels are contiguous.
  bool along_pixels = pixel_stride == 1;
  int lane = along_pixels ? threadIdx.x % DELTA_PIXELS : threadIdx.x / DELTA_GROUPS;
  int group = along_pixels ? threadIdx.x / DELTA_PIXELS : threadIdx.x % DELTA_GROUPS;
  int pixel = blockIdx.x * DELTA_PIXELS + lane;
  long long sample = (long long)blockIdx.y * channels * pixels;
  float sum = 0;
  if (pixel < pixels) {
#pragma unroll 4
    for (int c = group; c < channels; c += DELTA_GROUPS) {
      long long place = sample + (long long)c * channel_stride + (long long)pixel * pixel_stride;
      sum = fmaf(to_float(grad[place]), to_float(attended[place]), sum);
    }
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (threadIdx.x < DELTA_PIXELS) {
    pixel = blockIdx.x * DELTA_PIXELS + threadIdx.x;
    sum = 0;
    for (int g = 0; g < DELTA_GROUPS; g++) sum += sums[g][threadIdx.x];
    if (pixel < pixels) delta[(long long)blockIdx.y * pixels + pixel] = sum;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) shares[blockIdx.y * gridDim.x + blockIdx.x] = sum;
  }
}

// ---- d gamma: the sum of the blocks' shares, by one block of 256 threads, always in the same order ----
extern "C" __global__ void __launch_bounds__(256) backward_gamma(const float* __restrict__ shares,  // [count]
                                                                 float* __restrict__ dgamma,        // [1]
                                                                 int count) {
  __shared__ float sums[256];
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += 256) sum += shares[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *dgamma = sums[0];
}

// ---- out[c, i] = gamma Σ_split partial[split, i, c], 32 pixels × 32 channels a block of 32 × 8 threads ----
template <class T>
__device__ void sum_of_splits(const float* __restrict__ partial,  // [splits, B, pixels, pitch]
                              const float* __restrict__ gamma,    // [1]
                              T* __restrict__ out,                // [B, channels, pixels], as are the strides
                              int splits, int pitch, int channels, int pixels, int channel_stride, int pixel_stride) {
  __shared__ float tile[32][33];
  int first_pixel = blockIdx.x * 32, first_channel = blockIdx.y * 32;
  float scale = *gamma;
  for (int p = threadIdx.y; p < 32; p += 8) {
    int pixel = first_pixel + p, channel = first_channel + threadIdx.x;
    float sum = 0;
    if (pixel < pixels && channel < channels) {
      for (int split = 0; split < splits; split++) {
        sum += partial[(((long long)split * gridDim.z + blockIdx.z) * pixels + pixel) * pitch + channel];
      }
    }
    tile[p][threadIdx.x] = scale * sum;
  }
  __syncthreads();
  bool along_pixels = pixel_stride == 1;
  out += (long long)blockIdx.z * channels * pixels;
  for (int row = threadIdx.y; row < 32; row += 8) {
    int p = along_pixels ? threadIdx.x : row, c = along_pixels ? row : threadIdx.x;
    int pixel = first_pixel + p, channel = first_channel + c;
    if (pixel < pixels && channel < channels) {
      out[(long long)channel * channel_stride + (long long)pixel * pixel_stride] = from_float<T>(tile[p][c]);
    }
  }
}

#define ENTRY_POINTS(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(DELTA_PIXELS* DELTA_GROUPS) backward_delta_##NAME(                    \
      const T* grad, const T* attended, float* delta, float* shares, int channels, int pixels, int channel_stride,   \
      int pixel_stride) {                                                                                            \
    delta_of_block<T>(grad, attended, delta, shares, channels, pixels, channel_stride, pixel_stride);                \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256) backward_sum_##NAME(                                             \
      const float* partial, const float* gamma, T* out, int splits, int pitch, int channels, int pixels,             \
      int channel_stride, int pixel_stride) {                                                                        \
    sum_of_splits<T>(partial, gamma, out, splits, pitch, channels, pixels, channel_stride, pixel_stride);            \
  }
ENTRY_POINTS(f32, float)
ENTRY_POINTS(f16, f16)
ENTRY_POINTS(bf16, bf16)
