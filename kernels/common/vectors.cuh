// 16 bytes of values at once: what a thread moves in one instruction. To be included after types.cuh.
#pragma once

template <class T> constexpr int VALUES = 16 / sizeof(T);

template <class T> __device__ __forceinline__ void load_values(float (&value)[VALUES<T>], const T* place) {
  uint4 four = *(const uint4*)place;
  unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      value[i] = __uint_as_float(words[i]);
    } else {
      value[2 * i] = low_half<T>(words[i]);
      value[2 * i + 1] = high_half<T>(words[i]);
    }
  }
}

template <class T> __device__ __forceinline__ void store_values(T* place, const float (&value)[VALUES<T>]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(value[i]);
    } else {
      words[i] = pack<T>(value[2 * i], value[2 * i + 1]);
    }
  }
  // The compiler splits a plain store of 16 bytes here.
  __stcg((uint4*)place, make_uint4(words[0], words[1], words[2], words[3]));
}
