// Instructions that CUDA C++ has no words for, on every architecture from sm_75: one wrapper each, no policy.
#pragma once

#include "types.cuh"

// Dynamic shared memory of the block, aligned to 1024 bytes from sm_90 on (16 before).
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

// 2^x, about 2 ulp; 2^-infinity is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Copies of BYTES (4, 8 or 16, both ends aligned to it) that run while the thread goes on; zeros where not `valid`
// (`global` must then still be a valid address, but is not read).
// Before sm_80 the copy is done at once.
template <int BYTES> __device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(BYTES), "r"(bytes)
                 : "memory");
  }
#else
  if constexpr (BYTES == 16) {
    *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
  } else if constexpr (BYTES == 8) {
    *(uint2*)shared = valid ? *(const uint2*)global : make_uint2(0, 0);
  } else {
    *(unsigned*)shared = valid ? *(const unsigned*)global : 0u;
  }
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most PENDING of this thread's committed groups are under way.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four 8 × 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
// Register m of lane l then holds row l / 4, columns 2 (l % 4) and the next, of matrix m; of its transpose with _trans.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with a 16 × 16 (row major), b 16 × 8 (column major), d 16 × 8, of one warp. With g = lane / 4, t = lane % 4:
//   a: {rows g, columns 2t..}, {g + 8, 2t..}, {g, 2t + 8..}, {g + 8, 2t + 8..}
//   b: {rows 2t.., column g}, {2t + 8.., g}        d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// T is f16 (from sm_75) or bf16 (from sm_80).
template <class T> __device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                                               const unsigned (&b)[2]);
template <> __device__ __forceinline__ void mma_16x8x16<f16>(float (&d)[4], const unsigned (&a)[4],
                                                             const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; half++) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}
template <> __device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const unsigned (&a)[4],
                                                              const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// 16 bytes (aligned to them) that nobody writes meanwhile; zeros where not `valid`, and then nothing is read.
// An `if` around a load becomes a branch that keeps the next load waiting for this one; this does not.
__device__ __forceinline__ uint4 load_16(const void* global, bool valid) {
  uint4 result;
  asm("{.reg .pred valid; setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@valid ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(result.x), "=&r"(result.y), "=&r"(result.z), "=&r"(result.w)
      : "l"(global), "r"((int)valid));
  return result;
}

// Adds to four floats in device memory (aligned to 16 bytes), each atomically. Before sm_90 they are four requests.
__device__ __forceinline__ void atomic_add_4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// Blocks that wait for each other. What a block wrote before its threads met at a barrier and one of them counted can be
// read by a block one of whose threads has seen the count, once its threads have met. No block may wait for one that
// cannot start.
__device__ __forceinline__ unsigned count_up(unsigned* count) {  // returns what it was
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}
__device__ __forceinline__ void wait_for_count(const unsigned* count, unsigned least) {
  unsigned now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
  } while (now < least);
}
