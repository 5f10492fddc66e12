// Instructions that only Hopper has (sm_90a): asynchronous matrix products of a warpgroup (128 threads), barriers
// in shared memory, clusters of blocks that read each other's shared memory. One wrapper each, no policy.
#pragma once

#include "ptx.cuh"

// ---- barriers in shared memory: `count` arrivals complete a phase; waiting names the parity of the phase awaited ----
using Barrier = unsigned long long;
__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// The same barrier of the cluster's block `rank`.
__device__ __forceinline__ void barrier_arrive_at(unsigned rank, Barrier* barrier) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives, and has the phase wait for so many bytes of bulk copies too.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Makes this thread's barrier_init visible to copies and, after the next cluster_sync, to the cluster.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Copies `bytes` (a multiple of 16, as both addresses) to the same place in the RANKS blocks of the cluster, and tells
// the same barrier of each. The copy belongs to the async proxy: what it overwrites must be read by wgmma alone, or
// before a fence and a barrier.
template <int RANKS>
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, Barrier* barrier) {
  if constexpr (RANKS == 1) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"((unsigned short)((1 << RANKS) - 1))
        : "memory");
  }
}
// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads of the block, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Makes this thread's writes to shared memory visible to the wgmma that follow the next barrier.
__device__ __forceinline__ void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers change hands between warpgroups: the kernel needs __launch_bounds__(threads, 1) ----
template <int COUNT> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- clusters ----
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of the cluster's block `rank`, readable like any other memory.
template <class T> __device__ __forceinline__ const T* shared_of(unsigned rank, const T* place) {
  unsigned long long result;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"((unsigned long long)place), "r"(rank));
  return (const T*)result;
}

template <class T> constexpr bool is_bf16 = false;
template <> inline constexpr bool is_bf16<bf16> = true;

// ---- wgmma: d[64 × N] (+)= a[64 × 16] b[16 × N], asynchronous from here to wgmma_wait ----
// a: warp w of the warpgroup holds rows 16 w … 16 w + 15, laid out as mma_16x8x16's a.
// d: likewise rows 16 w …; d[4 j + i] is element i of mma_16x8x16's d for columns 8 j … 8 j + 7.
// b: in shared memory, described by `matrix_descriptor`.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A matrix of 16-bit values in shared memory, in rows of SWIZZLE (64 or 128) bytes whose 16-byte pieces are swizzled:
// piece p of row r lies at place p ^ (r % 8) in rows of 128 bytes, p ^ (r / 2 % 4) in rows of 64; groups of 8 rows
// start at multiples of 8 × SWIZZLE bytes. PTX ISA, "Asynchronous warpgroup level matrix shared memory layout".
//   K-major (MN_MAJOR 0), a row is one n, contiguous along k: `stride` bytes lead from 8 n to the next 8; a step of
//     16 k within a row adds 32 bytes to `start`.
//   MN-major (MN_MAJOR 1), a row is one k, contiguous along n: `stride` bytes lead from 8 k to the next 8, `leading`
//     bytes from one row's worth of n to the next (64 n in rows of 128 bytes).
template <int SWIZZLE>
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned start, unsigned leading, unsigned stride) {
  unsigned long long layout = SWIZZLE == 128 ? 1 : 2;
  return layout << 62 | (unsigned long long)(stride >> 4 & 0x3fff) << 32 |
         (unsigned long long)(leading >> 4 & 0x3fff) << 16 | (start >> 4 & 0x3fff);
}

#define WGMMA_64x64x16(TYPE)  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"  \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"  \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),  \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),  \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),  \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(MN_MAJOR))

#define WGMMA_64x256x16(TYPE)  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"  \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "  \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "  \
      "{%128, %129, %130, %131}, %132, p, 1, 1, %134;}"  \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),  \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),  \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),  \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),  \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),  \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),  \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),  \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),  \
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),  \
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),  \
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),  \
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),  \
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),  \
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),  \
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),  \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(MN_MAJOR))

// wgmma_64xNx16<T, MN_MAJOR>(d, a, b, accumulate): d = a b where not `accumulate`.
template <class T, int MN_MAJOR>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], const unsigned (&a)[4], unsigned long long b,
                                              bool accumulate) {
  if constexpr (is_bf16<T>) {
    WGMMA_64x64x16("bf16");
  } else {
    WGMMA_64x64x16("f16");
  }
}
template <class T, int MN_MAJOR>
__device__ __forceinline__ void wgmma_64x256x16(float (&d)[128], const unsigned (&a)[4], unsigned long long b,
                                              bool accumulate) {
  if constexpr (is_bf16<T>) {
    WGMMA_64x256x16("bf16");
  } else {
    WGMMA_64x256x16("f16");
  }
}

// ---- the same with a in shared memory too, K-major like b: rows of 16 k, described by a descriptor of its own ----
// wgmma_shared<T>(d, a, b): d[64 × N] += a b, N twice the number of registers in d: 64, 128 or 256.
#define D_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define D_32(i) D_8(i), D_8(i + 8), D_8(i + 16), D_8(i + 24)
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_SHARED(N, TYPE, NAMES, A, B, ONE, ...)                                                    \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ONE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;}"                                             \
               : __VA_ARGS__                                                                             \
               : "l"(a), "l"(b), "n"(1))
template <class T>
__device__ __forceinline__ void wgmma_shared(float (&d)[32], unsigned long long a, unsigned long long b) {
  if constexpr (is_bf16<T>) {
    WGMMA_SHARED("64", "bf16", NAMES_32, "%32", "%33", "%34", D_32(0));
  } else {
    WGMMA_SHARED("64", "f16", NAMES_32, "%32", "%33", "%34", D_32(0));
  }
}
template <class T>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], unsigned long long a, unsigned long long b) {
  if constexpr (is_bf16<T>) {
    WGMMA_SHARED("128", "bf16", NAMES_64, "%64", "%65", "%66", D_32(0), D_32(32));
  } else {
    WGMMA_SHARED("128", "f16", NAMES_64, "%64", "%65", "%66", D_32(0), D_32(32));
  }
}
template <class T>
__device__ __forceinline__ void wgmma_shared(float (&d)[128], unsigned long long a, unsigned long long b) {
  if constexpr (is_bf16<T>) {
    WGMMA_SHARED("256", "bf16", NAMES_128, "%128", "%129", "%130", D_32(0), D_32(32), D_32(64), D_32(96));
  } else {
    WGMMA_SHARED("256", "f16", NAMES_128, "%128", "%129", "%130", D_32(0), D_32(32), D_32(64), D_32(96));
  }
}
