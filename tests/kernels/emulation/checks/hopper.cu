// Small kernels for the tests of the emulation itself: what only Hopper has, and blocks that wait for others. None has
// __shared__ arrays, which blocks that run at once would share.
#include "hopper.cuh"

// d [64, N] += a [64, 16 STEPS] b. b lies in shared memory as the descriptor says: `image` is a copy of that memory.
template <class T, int N, int SWIZZLE, int MN_MAJOR> __device__ void multiply(const T* a, const T* image, float* d,
                                                                             int steps, int bytes, int leading,
                                                                             int stride, int step) {
  int thread = threadIdx.x, lane = thread % 32, g = thread / 32 * 16 + lane / 4, t = lane % 4 * 2;
  unsigned char* shared = dynamic_shared();
  for (int i = thread; i < bytes / 16; i += 128) ((uint4*)shared)[i] = ((const uint4*)image)[i];
  fence_shared_for_wgmma();
  __syncthreads();
  float rd[N / 2];
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rd[4 * j + i] = d[(g + i / 2 * 8) * N + 8 * j + t + i % 2];
  }
  wgmma_fence();
  for (int k = 0; k < steps; k++) {
    unsigned ra[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const T* pair = &a[(g + i % 2 * 8) * 16 * steps + 16 * k + t + i / 2 * 8];
      ra[i] = pair[0].bits | (unsigned)pair[1].bits << 16;
    }
    unsigned long long b = matrix_descriptor<SWIZZLE>(shared_address(shared) + k * step, leading, stride);
    if constexpr (N == 64) {
      wgmma_64x64x16<T, MN_MAJOR>(rd, ra, b, true);
    } else {
      wgmma_64x256x16<T, MN_MAJOR>(rd, ra, b, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * N + 8 * j + t + i % 2] = rd[4 * j + i];
  }
}
#define MULTIPLY(TYPE, N, SWIZZLE, MAJOR)  \
  extern "C" __global__ void __launch_bounds__(128) multiply_##TYPE##_##N##_##SWIZZLE##_##MAJOR(  \
      const TYPE* a, const TYPE* image, float* d, int steps, int bytes, int leading, int stride, int step) {  \
    multiply<TYPE, N, SWIZZLE, MAJOR>(a, image, d, steps, bytes, leading, stride, step);  \
  }
#define LAYOUTS(TYPE, N)  \
  MULTIPLY(TYPE, N, 64, 0) MULTIPLY(TYPE, N, 64, 1) MULTIPLY(TYPE, N, 128, 0) MULTIPLY(TYPE, N, 128, 1)
LAYOUTS(f16, 64)
LAYOUTS(bf16, 64)
LAYOUTS(f16, 256)
LAYOUTS(bf16, 256)

// d [64, N] += a [64, 64] b [64, N], both in shared memory. `images` is that memory: b from `start_b` on, a from `start_a`,
// from 8 of its rows to the next 8 `stride_a` bytes.
template <class T, int N> __device__ void multiply_shared(const T* images, float* d, int bytes, int start_a,
                                                          int stride_a, int start_b) {
  int thread = threadIdx.x, lane = thread % 32, g = thread / 32 * 16 + lane / 4, t = lane % 4 * 2;
  unsigned char* shared = dynamic_shared();
  for (int i = thread; i < bytes / 16; i += 128) ((uint4*)shared)[i] = ((const uint4*)images)[i];
  fence_shared_for_wgmma();
  __syncthreads();
  float rd[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) rd[i] = d[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + t + i % 2];
  wgmma_fence();
  for (int k = 0; k < 128; k += 32) {
    wgmma_shared<T>(rd, matrix_descriptor<128>(shared_address(shared) + start_a + k, 16, stride_a),
                    matrix_descriptor<128>(shared_address(shared) + start_b + k, 16, 1024));
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + t + i % 2] = rd[i];
}
#define MULTIPLY_SHARED(TYPE, N)  \
  extern "C" __global__ void __launch_bounds__(128) multiply_shared_##TYPE##_##N(  \
      const TYPE* images, float* d, int bytes, int start_a, int stride_a, int start_b) {  \
    multiply_shared<TYPE, N>(images, d, bytes, start_a, stride_a, start_b);  \
  }
MULTIPLY_SHARED(f16, 64)
MULTIPLY_SHARED(f16, 128)
MULTIPLY_SHARED(f16, 256)
MULTIPLY_SHARED(bf16, 64)
MULTIPLY_SHARED(bf16, 128)
MULTIPLY_SHARED(bf16, 256)

// The accumulators are read before the wait, or no fence came before the product, or warps disagree, or b is overwritten
// before the wait.
template <bool WAIT, bool FENCE, bool SAME, bool KEPT> __device__ void one_product(float* out) {
  unsigned char* shared = dynamic_shared();
  for (int i = threadIdx.x; i < 1024; i += 128) ((f16*)shared)[i] = from_float<f16>(1.0f);
  fence_shared_for_wgmma();
  __syncthreads();
  float d[32];
  for (float& value : d) value = 5.0f;  // which is not added to
  unsigned one = pack<f16>(1.0f, 1.0f), a[4] = {one, one, one, one};
  if (FENCE) wgmma_fence();
  unsigned start = shared_address(shared) + (SAME ? 0 : threadIdx.x / 32 * 32);
  wgmma_64x64x16<f16, 0>(d, a, matrix_descriptor<64>(start, 0, 512), false);
  wgmma_commit();
  if (!KEPT) ((f16*)shared)[threadIdx.x] = from_float<f16>(2.0f);
  if (WAIT) wgmma_wait<0>();
  out[threadIdx.x] = d[0];
  wgmma_wait<0>();
}
#define ONE_PRODUCT(NAME, WAIT, FENCE, SAME, KEPT)  \
  extern "C" __global__ void __launch_bounds__(128) product_##NAME(float* out) {  \
    one_product<WAIT, FENCE, SAME, KEPT>(out);  \
  }
ONE_PRODUCT(right, true, true, true, true)
ONE_PRODUCT(unfinished, false, true, true, true)
ONE_PRODUCT(unfenced, true, false, true, true)
ONE_PRODUCT(disagreed, true, true, false, true)
ONE_PRODUCT(overwritten, true, true, true, false)

// out[cluster] = the sum of x over the cluster's two blocks; block 0 reads the shared memory of block 1.
template <bool BEFORE, bool AFTER> __device__ void cluster_sum(const float* x, float* out) {
  float* mine = (float*)dynamic_shared();
  mine[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (BEFORE) cluster_sync();
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int rank = 0; rank < 2; rank++) {
      for (int i = 0; i < 64; i++) sum += *shared_of(rank, &mine[i]);
    }
    out[blockIdx.x / 2] = sum;
  }
  if (AFTER) cluster_sync();
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_sum_right(const float* x, float* out) {
  cluster_sum<true, true>(x, out);
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_sum_unwritten(const float* x, float* out) {
  cluster_sum<false, true>(x, out);
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_sum_gone(const float* x, float* out) {
  cluster_sum<true, false>(x, out);
}

// Warp 0 brings tiles, warp 1 takes them, through two buffers and barriers in shared memory. out = x.
template <bool WAITS, bool INITIALISED> __device__ void pipeline(const float* x, float* out, int tiles) {
  unsigned char* shared = dynamic_shared();
  Barrier *full = (Barrier*)shared, *empty = full + 2;
  float* buffers = (float*)(shared + 64);
  int lane = threadIdx.x % 32;
  if (INITIALISED && threadIdx.x < 4) barrier_init(&full[threadIdx.x], 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int tile = 0; tile < tiles; tile++) {
      if (WAITS) barrier_wait(&empty[tile % 2], (tile / 2 & 1) ^ 1);
      buffers[tile % 2 * 32 + lane] = x[tile * 32 + lane];
      barrier_arrive(&full[tile % 2]);
    }
  } else {
    for (int tile = 0; tile < tiles; tile++) {
      barrier_wait(&full[tile % 2], tile / 2 & 1);
      out[tile * 32 + lane] = buffers[tile % 2 * 32 + (lane ^ 1)];
      barrier_arrive(&empty[tile % 2]);
    }
  }
}
extern "C" __global__ void pipeline_right(const float* x, float* out, int tiles) { pipeline<true, true>(x, out, tiles); }
extern "C" __global__ void pipeline_hasty(const float* x, float* out, int tiles) {
  pipeline<false, true>(x, out, tiles);
}
extern "C" __global__ void pipeline_uninitialised(const float* x, float* out, int tiles) {
  pipeline<true, false>(x, out, tiles);
}

// Each of a cluster's two blocks copies its half of x [32] to both; they write out [2, 32].
template <bool WAIT> __device__ void share(const float* x, float* out) {
  unsigned char* shared = dynamic_shared();
  Barrier *full = (Barrier*)shared, *seen = full + 1;
  float* values = (float*)(shared + 64);
  int rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(seen, 2);
    barriers_ready();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    barrier_expect(full, 128);
    bulk_copy<2>(values + rank * 16, x + rank * 16, 64, full);
  }
  if (WAIT) barrier_wait(full, 0);
  out[rank * 32 + threadIdx.x] = values[threadIdx.x];
  __syncwarp();
  if (threadIdx.x < 2) barrier_arrive_at(threadIdx.x, seen);
  barrier_wait(seen, 0);
  barrier_wait(full, 0);
  cluster_sync();
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) share_right(const float* x, float* out) { share<true>(x, out); }
extern "C" __global__ void __cluster_dims__(2, 1, 1) share_hasty(const float* x, float* out) { share<false>(x, out); }

// Two pairs of warps meet apart from each other.
extern "C" __global__ void meet_in_pairs(float* out, int threads) {
  float* values = (float*)dynamic_shared();
  int pair = threadIdx.x / 64;
  values[threadIdx.x] = (float)threadIdx.x;
  named_barrier(1 + pair, threads);
  out[threadIdx.x] = values[threadIdx.x ^ 63];
}

// Every block but the first gives a number; the first waits for all of them, and adds.
template <bool WAIT> __device__ void add_blocks(const float* x, float* given, unsigned* count, float* sum) {
  if (blockIdx.x > 0) {
    given[blockIdx.x] = x[blockIdx.x];
    count_up(count);
    return;
  }
  if (WAIT) wait_for_count(count, gridDim.x - 1);
  float total = x[0];
  for (int block = 1; block < (int)gridDim.x; block++) total += given[block];
  *sum = total;
}
extern "C" __global__ void add_blocks_right(const float* x, float* given, unsigned* count, float* sum) {
  add_blocks<true>(x, given, count, sum);
}
extern "C" __global__ void add_blocks_hasty(const float* x, float* given, unsigned* count, float* sum) {
  add_blocks<false>(x, given, count, sum);
}
