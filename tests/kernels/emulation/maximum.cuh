// The emulation's side of kernels/common/maximum.cuh: the same names and meanings, by way of float.
#pragma once

#include "types.cuh"

inline float maximum(float a, float b) { return isnan(a) || a > b ? a : b; }

template <class T> inline unsigned maximum_each(unsigned a, unsigned b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(maximum(__uint_as_float(a), __uint_as_float(b)));
  } else {
    return pack<T>(maximum(low_half<T>(a), low_half<T>(b)), maximum(high_half<T>(a), high_half<T>(b)));
  }
}
