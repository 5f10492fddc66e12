// Included before a kernel's first line: the words of CUDA C++ for a C++ compiler of the host.
// A thread is a fiber (machine.cpp); shared arrays are static, since blocks run one after another.
#pragma once

#include "machine.h"

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#ifndef EMULATED_SCAN  // a scan for entry points wants to see these
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#endif

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block)
#define blockDim (emulated::self->threads)
#define gridDim (emulated::self->blocks)
constexpr int warpSize = 32;

// ---- vectors ----
#define VECTOR(TYPE, NAME)  \
  struct __attribute__((aligned(2 * sizeof(TYPE)))) NAME##2 { TYPE x, y; };  \
  struct NAME##3 { TYPE x, y, z; };  \
  struct __attribute__((aligned(sizeof(TYPE) == 8 ? 16 : 4 * sizeof(TYPE)))) NAME##4 { TYPE x, y, z, w; };  \
  inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }  \
  inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return {x, y, z}; }  \
  inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
VECTOR(unsigned, uint)
VECTOR(signed char, char)
VECTOR(unsigned char, uchar)
VECTOR(short, short)
VECTOR(unsigned short, ushort)
VECTOR(int, int)
VECTOR(long long, longlong)
VECTOR(unsigned long long, ulonglong)
VECTOR(float, float)
VECTOR(double, double)
#undef VECTOR

// ---- arithmetic ----
extern "C" {
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float powf(float, float) noexcept;
float tanhf(float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float truncf(float) noexcept;
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float fmodf(float, float) noexcept;
float copysignf(float, float) noexcept;
int printf(const char*, ...);
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
// Never made part of a fused multiply-add.
inline float __fmul_rn(float x, float y) { volatile float result = x * y; return result; }
inline float __fadd_rn(float x, float y) { volatile float result = x + y; return result; }
inline float __fsub_rn(float x, float y) { volatile float result = x - y; return result; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }

#define MIN_MAX(TYPE)  \
  constexpr TYPE min(TYPE x, TYPE y) { return y < x ? y : x; }  \
  constexpr TYPE max(TYPE x, TYPE y) { return x < y ? y : x; }
MIN_MAX(int)
MIN_MAX(unsigned)
MIN_MAX(long)
MIN_MAX(unsigned long)
MIN_MAX(long long)
MIN_MAX(unsigned long long)
#undef MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
constexpr int abs(int x) { return x < 0 ? -x : x; }

// Conversions to integers saturate, and make 0 of NaN.
inline int __float2int_rz(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? 0x7fffffff : x < -2147483648.0f ? -0x7fffffff - 1 : (int)x;
}
inline int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
inline unsigned __float2uint_rz(float x) { return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? ~0u : (unsigned)x; }
inline unsigned __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

template <class To, class From> inline To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((unsigned long long)x * y >> 32); }
inline int __mul24(int x, int y) { return x * y; }

// ---- memory ----
template <class T> inline T __ldg(const T* pointer) { return *pointer; }
template <class T> inline T __ldcs(const T* pointer) { return *pointer; }
template <class T> inline T __ldcg(const T* pointer) { return *pointer; }
template <class T> inline T __ldca(const T* pointer) { return *pointer; }
template <class T> inline T __ldcv(const T* pointer) { return *pointer; }
template <class T> inline void __stcs(T* pointer, T value) { *pointer = value; }
template <class T> inline void __stcg(T* pointer, T value) { *pointer = value; }
template <class T> inline void __stwt(T* pointer, T value) { *pointer = value; }
// One machine thread runs all of them: the order in which it writes is the order in which all see it.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

#define ATOMIC(TYPE)  \
  inline TYPE atomicAdd(TYPE* at, TYPE value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicSub(TYPE* at, TYPE value) { return __atomic_fetch_sub(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicAnd(TYPE* at, TYPE value) { return __atomic_fetch_and(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicOr(TYPE* at, TYPE value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicXor(TYPE* at, TYPE value) { return __atomic_fetch_xor(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicExch(TYPE* at, TYPE value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); }  \
  inline TYPE atomicCAS(TYPE* at, TYPE old, TYPE value) {  \
    __atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);  \
    return old;  \
  }  \
  inline TYPE atomicMax(TYPE* at, TYPE value) {  \
    TYPE old = __atomic_load_n(at, __ATOMIC_RELAXED);  \
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}  \
    return old;  \
  }  \
  inline TYPE atomicMin(TYPE* at, TYPE value) {  \
    TYPE old = __atomic_load_n(at, __ATOMIC_RELAXED);  \
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}  \
    return old;  \
  }
ATOMIC(int)
ATOMIC(unsigned)
ATOMIC(unsigned long long)
#undef ATOMIC
inline float atomicAdd(float* at, float value) {
  unsigned* bits = (unsigned*)at;
  unsigned old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + value), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return __uint_as_float(old);
}
inline float atomicExch(float* at, float value) {
  return __uint_as_float(__atomic_exchange_n((unsigned*)at, __float_as_uint(value), __ATOMIC_RELAXED));
}

// ---- threads together ----
inline void __syncthreads(emulated::Place place = emulated::here()) { emulated::block_barrier(0, 0, place); }
inline void __syncwarp(unsigned mask = ~0u, emulated::Place place = emulated::here()) {
  emulated::warp_barrier(mask, place);
}

namespace emulated {

struct Shuffle { unsigned long long mine, result; int source; };
void shuffle(void* const (&lanes)[32]);
template <class T> inline T exchange(unsigned mask, T value, int source, const char* name, Place place) {
  static_assert(sizeof(T) <= 8);
  Shuffle record{0, 0, source};
  __builtin_memcpy(&record.mine, &value, sizeof(T));
  together(mask, name, shuffle, &record, place);
  __builtin_memcpy(&value, &record.result, sizeof(T));
  return value;
}

struct Vote { bool mine; unsigned result; };
void vote(void* const (&lanes)[32]);
inline unsigned ballot(unsigned mask, bool mine, const char* name, Place place) {
  Vote record{mine, 0};
  together(mask, name, vote, &record, place);
  return record.result;
}

}  // namespace emulated

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                                        emulated::Place place = emulated::here()) {
  int first = emulated::lane() & ~(width - 1);
  return emulated::exchange(mask, value, first + (source & (width - 1)), "__shfl_sync", place);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                                            emulated::Place place = emulated::here()) {
  int lane = emulated::lane(), source = lane ^ bits;
  if (source >= (lane & ~(width - 1)) + width) source = lane;
  return emulated::exchange(mask, value, source, "__shfl_xor_sync", place);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                                             emulated::Place place = emulated::here()) {
  int lane = emulated::lane(), source = lane + (int)by;
  if (source >= (lane & ~(width - 1)) + width) source = lane;
  return emulated::exchange(mask, value, source, "__shfl_down_sync", place);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                                           emulated::Place place = emulated::here()) {
  int lane = emulated::lane(), source = lane - (int)by;
  if (source < (lane & ~(width - 1))) source = lane;
  return emulated::exchange(mask, value, source, "__shfl_up_sync", place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulated::Place place = emulated::here()) {
  return emulated::ballot(mask, predicate != 0, "__ballot_sync", place);
}
inline int __any_sync(unsigned mask, int predicate, emulated::Place place = emulated::here()) {
  return emulated::ballot(mask, predicate != 0, "__any_sync", place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulated::Place place = emulated::here()) {
  return emulated::ballot(mask, predicate == 0, "__all_sync", place) == 0;
}
