// The emulation's side of kernels/common/ptx.cuh: the same names and meanings, lane by lane.
#pragma once

#include "types.cuh"

inline unsigned char* dynamic_shared(emulated::Place place = emulated::here()) {
  return emulated::dynamic_shared(place);
}
inline unsigned shared_address(const void* pointer, emulated::Place place = emulated::here()) {
  return emulated::shared_offset(pointer, place);
}

inline float exp2_fast(float x) {
  float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
}

// A copy is done at the last moment allowed, by the wait that covers it. Until then its place in shared memory holds
// NaN: both a read that comes before the wait and a copy issued while others still read the place are seen.
template <int BYTES> inline void cp_async(void* shared, const void* global, bool valid = true,
                                          emulated::Place place = emulated::here()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulated::check_shared(shared, BYTES, "cp_async", place);
  if ((unsigned long long)global % BYTES) emulated::fail(place, "cp_async: %p is not aligned to %d", global, BYTES);
  for (int i = 0; i < BYTES / 4; i++) {
    if (valid) (void)((const volatile unsigned*)global)[i];  // a sanitizer judges the address here
    ((volatile unsigned*)shared)[i] = ~0u;
  }
  emulated::copy_later({shared, global, valid, BYTES});
}
inline void cp_async_commit() { emulated::copies_commit(); }
template <int PENDING> inline void cp_async_wait() {
  emulated::Copy copy;
  while (emulated::copy_due(PENDING, copy)) {
    for (int i = 0; i < copy.bytes / 4; i++) {
      ((unsigned*)copy.shared)[i] = copy.valid ? ((const unsigned*)copy.global)[i] : 0u;
    }
  }
}

namespace emulated {
struct Rows { unsigned short row[8]; unsigned* r; };
void ldmatrix(void* const (&lanes)[32]);
void ldmatrix_trans(void* const (&lanes)[32]);
struct Tile { float* d; const unsigned *a, *b; };
void mma_f16(void* const (&lanes)[32]);
void mma_bf16(void* const (&lanes)[32]);

inline void load_matrices(unsigned (&r)[4], const void* row, Operation operation, Place place) {
  check_shared(row, 16, "ldmatrix", place);
  Rows record;
  for (int i = 0; i < 8; i++) record.row[i] = ((const unsigned short*)row)[i];
  record.r = r;
  together(~0u, "ldmatrix", operation, &record, place);
}
}  // namespace emulated

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, emulated::Place place = emulated::here()) {
  emulated::load_matrices(r, row, emulated::ldmatrix, place);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, emulated::Place place = emulated::here()) {
  emulated::load_matrices(r, row, emulated::ldmatrix_trans, place);
}

template <class T> inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                           emulated::Place place = emulated::here());
template <> inline void mma_16x8x16<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         emulated::Place place) {
  emulated::Tile record{d, a, b};
  emulated::together(~0u, "mma", emulated::mma_f16, &record, place);
}
template <> inline void mma_16x8x16<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                          emulated::Place place) {
  emulated::Tile record{d, a, b};
  emulated::together(~0u, "mma", emulated::mma_bf16, &record, place);
}

inline uint4 load_16(const void* global, bool valid, emulated::Place place = emulated::here()) {
  if (valid && (unsigned long long)global % 16) emulated::fail(place, "load_16: %p is not aligned to 16", global);
  return valid ? *(const uint4*)global : uint4{0, 0, 0, 0};
}
inline void atomic_add_4(float* to, float a, float b, float c, float d, emulated::Place place = emulated::here()) {
  if ((unsigned long long)to % 16) emulated::fail(place, "atomic_add_4: %p is not aligned to 16", (void*)to);
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
}

inline unsigned count_up(unsigned* count) { return emulated::count_add(count); }
inline void wait_for_count(const unsigned* count, unsigned least, emulated::Place place = emulated::here()) {
  emulated::count_await(count, least, place);
}
