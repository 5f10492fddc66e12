// Small kernels for the tests of the emulation itself: what every architecture has, right and deliberately wrong.
#include "ptx.cuh"

// out[block] = the sum of that block's part of x, by shuffles and shared memory.
template <class T, bool WRONG> __device__ void block_sum(const T* __restrict__ x, float* out, int n) {
  __shared__ float partial[32];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? to_float(x[i]) : 0.0f;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (!WRONG) __syncthreads();
  if (threadIdx.x == blockDim.x - 1) {
    float total = 0.0f;
    for (int w = 0; w < (int)blockDim.x / 32; w++) total += partial[w];
    out[blockIdx.x] = total;
  }
}
#define BLOCK_SUM(NAME, T, WRONG)  \
  extern "C" __global__ void __launch_bounds__(256) block_sum_##NAME(const T* x, float* out, int n) {  \
    block_sum<T, WRONG>(x, out, n);  \
  }
BLOCK_SUM(f32, float, false)
BLOCK_SUM(f16, f16, false)
BLOCK_SUM(bf16, bf16, false)
BLOCK_SUM(without_barrier, float, true)

// Everything a kernel can learn about where it is.
extern "C" __global__ void coordinates(int* out) {
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread] = 1000 * block + thread;
}

// to[i] += i-th scalar parameter
extern "C" __global__ void parameters(float* to, int a, long long b, float c, const float* null) {
  to[0] = a, to[1] = (float)(b >> 33), to[2] = c, to[3] = null == nullptr;
}

// out[lane] of each exchange, with segments of `width` lanes.
extern "C" __global__ void shuffles(float* out, int width) {
  int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, (float)lane, 5, width);
  out[32 + lane] = __shfl_up_sync(~0u, (float)lane, 3, width);
  out[64 + lane] = __shfl_down_sync(~0u, (float)lane, 3, width);
  out[96 + lane] = __shfl_xor_sync(~0u, (float)lane, 9, width);
  out[128 + lane] = (float)__ballot_sync(~0u, lane % 3 == 0);
  out[160 + lane] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 32) + 4 * __all_sync(~0u, lane < 31);
}

// One thread of the block is missing at the barrier.
extern "C" __global__ void divergent(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void half_a_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x < 16) value = __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

// A shuffle makes lanes wait for each other, and orders nothing they write.
template <bool BARRIER> __device__ void neighbours(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = (float)threadIdx.x;
  float sum = __shfl_xor_sync(~0u, 1.0f, 1);
  if (BARRIER) __syncwarp();
  out[threadIdx.x] = sum + values[threadIdx.x ^ 1];
}
extern "C" __global__ void neighbours_ordered(float* out) { neighbours<true>(out); }
extern "C" __global__ void neighbours_unordered(float* out) { neighbours<false>(out); }

// Writes x[i] where i may lie outside.
extern "C" __global__ void write_at(float* x, int i) { x[i] = 1.0f; }
extern "C" __global__ void read_at(const float* x, int i, float* out) { *out = x[i]; }
extern "C" __global__ void write_shared_at(float* out, int i) {
  __shared__ float values[40];
  values[i] = 1.0f;
  *out = values[0];
}
extern "C" __global__ void write_dynamic_at(float* out, int i) {
  ((float*)dynamic_shared())[i] = 1.0f;
  *out = *(float*)dynamic_shared();
}
extern "C" __global__ void read_misaligned(const float* x, int i, float* out) { *out = ((const float4*)(x + i))->x; }

// The order in which threads and blocks come first is told by who gets which ticket.
extern "C" __global__ void tickets(int* counter, int* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}
extern "C" __global__ void uninitialised(float* out) {
  __shared__ float values[32];
  out[64 * blockIdx.x + threadIdx.x] = values[threadIdx.x];
  out[64 * blockIdx.x + 32 + threadIdx.x] = ((float*)dynamic_shared())[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = ((float*)dynamic_shared())[threadIdx.x] = 1.0f;  // gone before the next block
}
extern "C" __global__ void sum_atomically(const float* x, float* sum, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(sum, x[i]);
}

extern "C" __global__ void round_f16(const float* x, f16* out) {
  out[blockIdx.x * 1024 + threadIdx.x] = from_float<f16>(x[blockIdx.x * 1024 + threadIdx.x]);
}
extern "C" __global__ void round_bf16(const float* x, bf16* out) {
  out[blockIdx.x * 1024 + threadIdx.x] = from_float<bf16>(x[blockIdx.x * 1024 + threadIdx.x]);
}
extern "C" __global__ void widen_f16(const f16* x, float* out) {
  out[blockIdx.x * 1024 + threadIdx.x] = to_float(x[blockIdx.x * 1024 + threadIdx.x]);
}
extern "C" __global__ void widen_bf16(const bf16* x, float* out) {
  out[blockIdx.x * 1024 + threadIdx.x] = to_float(x[blockIdx.x * 1024 + threadIdx.x]);
}

// d [16, 8] += a [16, 16] bᵀ, b [8, 16]: a and b come through shared memory and ldmatrix, b transposed on the way back
// where BY_COLUMNS (it is then [16, 8] in memory).
template <class T, bool BY_COLUMNS> __device__ void multiply(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T tile_a[16][16], tile_b[128];
  int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
  for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i] = b[i];
  __syncwarp();
  unsigned ra[4], rb[4], part[2];
  ldmatrix_x4(ra, &tile_a[lane % 16][lane / 16 * 8]);
  if (BY_COLUMNS) {
    ldmatrix_x4_trans(rb, &tile_b[lane % 16 * 8]);
  } else {
    ldmatrix_x4(rb, &tile_b[lane % 8 * 16 + lane / 8 % 2 * 8]);
  }
  part[0] = rb[0], part[1] = rb[1];
  float rd[4] = {d[g * 8 + t], d[g * 8 + t + 1], d[(g + 8) * 8 + t], d[(g + 8) * 8 + t + 1]};
  mma_16x8x16<T>(rd, ra, part);
  d[g * 8 + t] = rd[0], d[g * 8 + t + 1] = rd[1], d[(g + 8) * 8 + t] = rd[2], d[(g + 8) * 8 + t + 1] = rd[3];
}
#define MULTIPLY(NAME, T, BY_COLUMNS)  \
  extern "C" __global__ void multiply_##NAME(const T* a, const T* b, float* d) { multiply<T, BY_COLUMNS>(a, b, d); }
MULTIPLY(f16_rows, f16, false)
MULTIPLY(f16_columns, f16, true)
MULTIPLY(bf16_rows, bf16, false)
MULTIPLY(bf16_columns, bf16, true)

// out = x, tile by tile through two buffers of shared memory filled by cp_async; rows beyond n are zeros.
template <int PENDING, bool EARLY> __device__ void copy_tiles(const float* x, float* out, int tiles, int n) {
  float* buffers = (float*)dynamic_shared();
  int thread = threadIdx.x;
  auto fetch = [&](int tile) {
    int i = tile * 512 + thread * 4;
    bool valid = tile < tiles && i < n;
    cp_async<16>(&buffers[tile % 2 * 512 + thread * 4], &x[valid ? i : 0], valid);
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; tile++) {
    if (!EARLY) __syncthreads();  // all have read what fetch overwrites
    fetch(tile + 1);
    cp_async_wait<PENDING>();
    __syncthreads();
    for (int i = thread; i < 512; i += 128) out[tile * 512 + i] = buffers[tile % 2 * 512 + i];
  }
}
extern "C" __global__ void copy_tiles_right(const float* x, float* out, int tiles, int n) {
  copy_tiles<1, false>(x, out, tiles, n);
}
extern "C" __global__ void copy_tiles_unfinished(const float* x, float* out, int tiles, int n) {
  copy_tiles<2, false>(x, out, tiles, n);
}
extern "C" __global__ void copy_tiles_early(const float* x, float* out, int tiles, int n) {
  copy_tiles<1, true>(x, out, tiles, n);
}
extern "C" __global__ void copy_misaligned(const float* x, float* out) {
  __shared__ __align__(16) float tile[8];
  cp_async<16>(&tile[1], x);
  cp_async_commit();
  cp_async_wait<0>();
  *out = tile[1];
}
