// Storage types of tensors and their way to float and back. Arithmetic is always done in float.
// No header of CUDA is included, so that NVRTC compiles the kernels wherever it is installed alone.
#pragma once

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
using u8 = unsigned char;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(u8 value) { return value; }
__device__ __forceinline__ float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }

// Rounded to nearest, ties to even; f16 overflows to infinity.
template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ f16 from_float<f16>(float value) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) {
  bf16 result;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  unsigned bits = __float_as_uint(value);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result.bits = nan ? 0x7fff : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
  return result;
}

// Two 16-bit values in one register, the first in the low half.
template <class T> __device__ __forceinline__ unsigned pack(float low, float high) {
  return from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ unsigned pack<f16>(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <> __device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif

template <class T> __device__ __forceinline__ float low_half(unsigned packed) {
  return to_float(T{(unsigned short)(packed & 0xffff)});
}
template <class T> __device__ __forceinline__ float high_half(unsigned packed) {
  return to_float(T{(unsigned short)(packed >> 16)});
}

// A launch may begin before the kernel ahead of it on the stream has ended (Launch.early): nothing that kernel wrote is
// there, and nothing it reads may be written, before `wait_for_earlier` returns. Loads must not be of `__restrict__`
// constants, which the compiler would move ahead of it. `start_later` lets the next kernel begin; without it that
// begins when this one ends. Neither does anything where the launch is an ordinary one.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_later() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
