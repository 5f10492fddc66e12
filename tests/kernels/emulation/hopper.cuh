// The emulation's side of kernels/common/hopper.cuh: the same names; machine.cpp does the work.
#pragma once

#include "ptx.cuh"

template <class T> constexpr bool is_bf16 = false;
template <> inline constexpr bool is_bf16<bf16> = true;

using Barrier = unsigned long long;
inline void barrier_init(Barrier* barrier, int count, emulated::Place place = emulated::here()) {
  *(volatile Barrier*)barrier = 0;  // a sanitizer sees the write
  emulated::barrier_set(barrier, count, place);
}
inline void barrier_arrive(Barrier* barrier, emulated::Place place = emulated::here()) {
  (void)*(volatile const Barrier*)barrier;
  emulated::barrier_count(barrier, place);
}
inline void barrier_wait(Barrier* barrier, unsigned parity, emulated::Place place = emulated::here()) {
  (void)*(volatile const Barrier*)barrier;
  emulated::barrier_await(barrier, parity, place);
}
inline void barrier_arrive_at(unsigned rank, Barrier* barrier, emulated::Place place = emulated::here()) {
  barrier_arrive((Barrier*)emulated::at_rank(rank, barrier, place), place);
}
inline void barrier_expect(Barrier* barrier, int bytes, emulated::Place place = emulated::here()) {
  emulated::barrier_bytes(barrier, bytes, true, place);
}
inline void barriers_ready() {}

// Done at once, in the thread that asks for it: what others still read there is overwritten.
template <int RANKS> inline void bulk_copy(void* shared, const void* global, int bytes, Barrier* barrier,
                                           emulated::Place place = emulated::here()) {
  emulated::check_shared(shared, 16, "bulk_copy", place);
  if ((unsigned long long)global % 16) emulated::fail(place, "bulk_copy: %p is not aligned to 16", global);
  for (unsigned rank = 0; rank < RANKS; rank++) {
    bool here = RANKS == 1;
    void* to = here ? shared : (void*)emulated::at_rank(rank, shared, place);
    for (int i = 0; i < bytes / 16; i++) ((uint4*)to)[i] = ((const uint4*)global)[i];
    emulated::barrier_bytes(here ? barrier : (Barrier*)emulated::at_rank(rank, barrier, place), -bytes, false, place);
  }
}
inline void named_barrier(int id, int threads, emulated::Place place = emulated::here()) {
  if (id < 1 || id > 15) emulated::fail(place, "named_barrier: id must be 1 to 15, got %d", id);
  if (threads < 32 || threads % 32) emulated::fail(place, "named_barrier: whole warps are expected, got %d", threads);
  emulated::block_barrier(id, threads, place);
}
inline void fence_shared_for_wgmma() {}

template <int COUNT> inline void registers_up() { static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0); }
template <int COUNT> inline void registers_down() { static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0); }

inline unsigned cluster_rank() { return emulated::rank_in_cluster(); }
inline void cluster_sync(emulated::Place place = emulated::here()) { emulated::cluster_barrier(place); }
template <class T> inline const T* shared_of(unsigned rank, const T* in_shared,
                                             emulated::Place place = emulated::here()) {
  return (const T*)emulated::at_rank(rank, in_shared, place);
}

inline void wgmma_fence() { emulated::products_fence(); }
inline void wgmma_commit(emulated::Place place = emulated::here()) { emulated::products_commit(place); }
template <int PENDING> inline void wgmma_wait(emulated::Place place = emulated::here()) {
  emulated::products_wait(PENDING, place);
}

template <int SWIZZLE> inline unsigned long long matrix_descriptor(unsigned start, unsigned leading, unsigned stride) {
  static_assert(SWIZZLE == 64 || SWIZZLE == 128);
  unsigned long long layout = SWIZZLE == 128 ? 1 : 2;
  return layout << 62 | (unsigned long long)(stride >> 4 & 0x3fff) << 32 |
         (unsigned long long)(leading >> 4 & 0x3fff) << 16 | (start >> 4 & 0x3fff);
}

// The products are done at the wait that covers them: until then d keeps what it held.
template <class T, int MN_MAJOR> inline void wgmma_64x64x16(float (&d)[32], const unsigned (&a)[4],
                                                            unsigned long long b, bool accumulate,
                                                            emulated::Place place = emulated::here()) {
  emulated::product_later({d, {a[0], a[1], a[2], a[3]}, b, accumulate, is_bf16<T>, MN_MAJOR != 0, 64}, place);
}
template <class T, int MN_MAJOR> inline void wgmma_64x256x16(float (&d)[128], const unsigned (&a)[4],
                                                             unsigned long long b, bool accumulate,
                                                             emulated::Place place = emulated::here()) {
  emulated::product_later({d, {a[0], a[1], a[2], a[3]}, b, accumulate, is_bf16<T>, MN_MAJOR != 0, 256}, place);
}
// d += a b with both in shared memory, K-major.
template <class T, int REGISTERS>
inline void wgmma_shared(float (&d)[REGISTERS], unsigned long long a, unsigned long long b,
                         emulated::Place place = emulated::here()) {
  static_assert(REGISTERS == 32 || REGISTERS == 64 || REGISTERS == 128);
  emulated::product_later({d, {}, b, true, is_bf16<T>, false, 2 * REGISTERS, true, a}, place);
}
