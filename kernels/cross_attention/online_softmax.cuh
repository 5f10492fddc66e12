// What the forward kernels share: the weight of a key, the joining of shares of the keys, and the last step.
//
// A thread keeps `attended` for ROWS queries, not yet divided by the sum of weights: attended[group][i] belongs to query
// i / (EACH / ROWS) of its own. `maximum` is the largest logit met so far, `sum` the sum of weights relative to it.
#pragma once

#include "ptx.cuh"

constexpr float LOWEST = -3.402823466e38f;  // a maximum before any logit; finite, so that lowest - lowest is 0

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// exp(logit - maximum). The difference is taken first: it is exact where the two are close, however large they are.
__device__ __forceinline__ float weight(float logit, float maximum) {
  constexpr float LOG2_E = 1.44269504f;
  return exp2_fast((logit - maximum) * LOG2_E);
}

// Joins what the blocks of one query tile found in their shares of the keys, in the block that comes last; true there,
// and everywhere if there is only one share. The order of summation does not depend on the order of arrival.
template <int ROWS, int GROUPS, int EACH>
__device__ bool join_shares(float (&attended)[GROUPS][EACH], float (&maximum)[ROWS], float (&sum)[ROWS],
                            float* workspace,   // [shares][2 ROWS + GROUPS EACH][threads] of this query tile
                            unsigned* arrived,  // of this query tile; 0 before and after
                            int share, int shares) {
  if (shares == 1) return true;
  constexpr int FIELDS = 2 * ROWS + GROUPS * EACH;
  const int threads = blockDim.x;
  float* mine = workspace + (long long)share * FIELDS * threads + threadIdx.x;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    mine[row * threads] = maximum[row];
    mine[(ROWS + row) * threads] = sum[row];
  }
#pragma unroll
  for (int field = 0; field < GROUPS * EACH; field++) {
    mine[(2 * ROWS + field) * threads] = attended[field / EACH][field % EACH];
  }
  __threadfence();
  int* last = (int*)dynamic_shared();
  __syncthreads();  // all have written their part, and nobody reads the tiles any more
  if (threadIdx.x == 0) *last = atomicAdd(arrived, 1u) == (unsigned)shares - 1;
  __syncthreads();
  if (!*last) return false;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;

  const float* part = workspace + threadIdx.x;
  for (int other = 0; other < shares; other++) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      maximum[row] = fmaxf(maximum[row], part[((long long)other * FIELDS + row) * threads]);
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) sum[row] = 0;
#pragma unroll
  for (int field = 0; field < GROUPS * EACH; field++) attended[field / EACH][field % EACH] = 0;
  for (int other = 0; other < shares; other++, part += FIELDS * threads) {
    float scale[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      scale[row] = weight(part[row * threads], maximum[row]);
      sum[row] += scale[row] * part[(ROWS + row) * threads];
    }
#pragma unroll
    for (int field = 0; field < GROUPS * EACH; field++) {
      attended[field / EACH][field % EACH] +=
          scale[field % EACH / (EACH / ROWS)] * part[(2 * ROWS + field) * threads];
      if (field % 16 == 15) __syncwarp();  // keeps the compiler from fetching more than registers hold
    }
  }
  return true;
}

// One element of the result; `attended` may be null.
template <class T>
__device__ __forceinline__ void write(T* out, T* attended, const T* residual, long long place, float value,
                                      float gamma) {
  if (attended) attended[place] = from_float<T>(value);
  out[place] = from_float<T>(gamma * value + to_float(residual[place]));
}
