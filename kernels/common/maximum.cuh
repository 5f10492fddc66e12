// The larger of values; NaN where one of them is. On a GPU without the instruction, by way of float.
#pragma once

#include "types.cuh"

__device__ __forceinline__ float maximum(float a, float b) { return a != a || a > b ? a : b; }

// Of each of the values that a word holds: one float, or two of 16 bits.
template <class T> __device__ __forceinline__ unsigned maximum_each(unsigned a, unsigned b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(maximum(__uint_as_float(a), __uint_as_float(b)));
  } else {
    return pack<T>(maximum(low_half<T>(a), low_half<T>(b)), maximum(high_half<T>(a), high_half<T>(b)));
  }
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ unsigned maximum_each<f16>(unsigned a, unsigned b) {
  unsigned result;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
template <> __device__ __forceinline__ unsigned maximum_each<bf16>(unsigned a, unsigned b) {
  unsigned result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
#endif
