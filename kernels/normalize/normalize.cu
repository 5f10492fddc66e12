// relu(x · scale + shift) of each channel, channels-last: a thread makes 16 bytes of PIXELS pixels, all read before the
// first is written.
#include "types.cuh"
#include "vectors.cuh"

constexpr int THREADS = 256;
constexpr int PIXELS = 4;

// `out` may be x.
template <class T>
__device__ __forceinline__ void normalize_relu(const T* x, const float* scale, const float* shift, T* out,
                                               long long x_stride, long long out_stride, long long pixels,
                                               int vectors) {
  wait_for_earlier();
  start_later();
  long long first = (long long)blockIdx.x * (PIXELS * blockDim.y) + threadIdx.y;
#pragma unroll 1
  for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
    int channel = vector * VALUES<T>;
    float value[PIXELS][VALUES<T>], by[VALUES<T>], plus[VALUES<T>];
#pragma unroll
    for (int p = 0; p < PIXELS; p++) {
      long long pixel = min(first + p * (int)blockDim.y, pixels - 1);  // read anyway: no branch, no wait
      load_values(value[p], x + pixel * x_stride + channel);
    }
#pragma unroll
    for (int i = 0; i < VALUES<T>; i += 4) {
      load_values((float(&)[4])by[i], scale + channel + i);
      load_values((float(&)[4])plus[i], shift + channel + i);
    }
#pragma unroll
    for (int p = 0; p < PIXELS; p++) {
      long long pixel = first + p * (int)blockDim.y;
      if (pixel >= pixels) break;
#pragma unroll
      for (int i = 0; i < VALUES<T>; i++) {
        float y = fmaf(value[p][i], by[i], plus[i]);
        value[p][i] = y < 0.f ? 0.f : y;  // so written that NaN stays
      }
      store_values(out + pixel * out_stride + channel, value[p]);
    }
  }
}

#define NORMALIZE_RELU(T, NAME)  \
  extern "C" __global__ void __launch_bounds__(THREADS) normalize_relu_##NAME(  \
      const T* x, const float* scale, const float* shift, T* out, long long x_stride, long long out_stride,  \
      long long pixels, int vectors) {  \
    normalize_relu<T>(x, scale, shift, out, x_stride, out_stride, pixels, vectors);  \
  }

NORMALIZE_RELU(float, f32)
NORMALIZE_RELU(f16, f16)
NORMALIZE_RELU(bf16, bf16)
