// The emulation's side of kernels/common/types.cuh: the same names, exact rounding, NVIDIA's NaN (0x7fff).
#pragma once

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
using u8 = unsigned char;

inline float to_float(float value) { return value; }
inline float to_float(u8 value) { return value; }
inline float to_float(f16 value) { return (float)emulated_bits<_Float16>(value.bits); }
inline float to_float(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }

template <class T> inline T from_float(float value);
template <> inline float from_float<float>(float value) { return value; }
template <> inline f16 from_float<f16>(float value) {
  if (isnan(value)) return {0x7fff};
  return {emulated_bits<unsigned short>((_Float16)value)};
}
template <> inline bf16 from_float<bf16>(float value) {
  if (isnan(value)) return {0x7fff};
  unsigned bits = __float_as_uint(value);
  return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

template <class T> inline unsigned pack(float low, float high) {
  return from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}
template <class T> inline float low_half(unsigned packed) { return to_float(T{(unsigned short)(packed & 0xffff)}); }
template <class T> inline float high_half(unsigned packed) { return to_float(T{(unsigned short)(packed >> 16)}); }

// Kernels run one after the other here.
inline void wait_for_earlier() {}
inline void start_later() {}
