// Soft arg-max: of each key point's heat map the softmax, and under it the mean place and the mean frame. And relative
// transfer, which moves a source's key points as a driving face has moved. README.md has the reasons.
//
// A warp belongs to a key point and its lanes to 32 neighbouring pixels, a tile. A block takes some key points and a
// share of the tiles; what the blocks of a face find is merged by the one that comes last. Sums never depend on the
// order of arrival.
#include "motion.cuh"
#include "ptx.cuh"

constexpr int TILE = 32;
constexpr int MOST_POINTS = 16;             // of a block
constexpr int PIXEL = 5 * MOST_POINTS + 1;  // floats of a staged pixel, some unused: odd, against bank conflicts
constexpr float LOWEST = -3.402823466e38f;  // a maximum before any logit; finite: lowest - lowest is 0

// What has been seen of a heat map: the largest logit, and relative to it the sums of weights, places and frames.
struct Seen { float maximum, sums[7]; };  // weight, x, y, and the frame's entries

// The difference is taken first: it is exact where the two are close, however large they are.
__device__ __forceinline__ float weight(float logit, float maximum, float sharpness) {
  return exp2_fast((logit - maximum) * sharpness);
}

__device__ __forceinline__ void merge(Seen& seen, const Seen& other, float sharpness) {
  float maximum = fmaxf(seen.maximum, other.maximum);
  float mine = weight(seen.maximum, maximum, sharpness), theirs = weight(other.maximum, maximum, sharpness);
  seen.maximum = maximum;
#pragma unroll
  for (int i = 0; i < 7; i++) seen.sums[i] = fmaf(other.sums[i], theirs, seen.sums[i] * mine);
}

__device__ __forceinline__ void merge_warp(Seen& seen, float sharpness) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Seen other;
    other.maximum = __shfl_xor_sync(~0u, seen.maximum, distance);
#pragma unroll
    for (int i = 0; i < 7; i++) other.sums[i] = __shfl_xor_sync(~0u, seen.sums[i], distance);
    merge(seen, other, sharpness);
  }
}

__device__ __forceinline__ void write(const Seen& seen, float* value, float* jacobian) {
  value[0] = seen.sums[1] / seen.sums[0];
  value[1] = seen.sums[2] / seen.sums[0];
#pragma unroll
  for (int i = 0; i < 4; i++) jacobian[i] = seen.sums[3 + i] / seen.sums[0];
}

// STAGED: the channels of a pixel are neighbours in memory; a block reads them so, and passes them through shared
// memory. Else the pixels of a channel are.
template <class T, bool STAGED>
__device__ __forceinline__ void soft_keypoints(const T* logits,  // [B, 5 K, h · w], of the strides below
                                               long long stride_b, int stride_c, int stride_p,
                                               float* value,       // [B, K, 2]
                                               float* jacobian,    // [B, K, 2, 2]
                                               Seen* parts,        // [B, K, shares]; null if one share
                                               unsigned* arrived,  // [B, groups of points], zero; or null
                                               float sharpness,    // log2 e / temperature
                                               int K, int h, int w, int tiles) {  // of a share
  __shared__ float staged[STAGED ? 2 * TILE * PIXEL : 1];
  __shared__ bool last;
  wait_for_earlier();
  start_later();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pixels = h * w, shares = gridDim.x;
  const int points = blockDim.x / 32, first_point = blockIdx.y * points, k = first_point + warp;
  const bool mine = k < K;
  const long long b = blockIdx.z;
  logits += b * stride_b;

  // Five values a thread and tile: those of its pixel and key point, or as many of the tile in the order of memory.
  int pixel[5], from[5], to[5];
#pragma unroll
  for (int i = 0; i < 5; i++) {
    int channel = i == 0 ? k : K + 4 * k + i - 1;
    pixel[i] = lane;
    if constexpr (STAGED) {
      int n = i * blockDim.x + threadIdx.x, c = n % (5 * points);
      pixel[i] = n / (5 * points);
      to[i] = pixel[i] * PIXEL + c;
      channel = c < points ? first_point + c : K + 4 * first_point + c - points;
    }
    from[i] = min(channel, 5 * K - 1) * stride_c;
  }

  Seen seen = {LOWEST, {}};
  float values[5];
  int tile = blockIdx.x * tiles, end = min(tile + tiles, (pixels + TILE - 1) / TILE);
  auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 5; i++) {
      int at = min(tile * TILE + pixel[i], pixels - 1);
      values[i] = to_float(logits[from[i] + at * stride_p]);
    }
  };
  fetch(tile);
#pragma unroll 1
  for (int turn = 0; tile < end; tile++, turn ^= 1) {
    float own[5];
    if constexpr (STAGED) {
      float* place = staged + turn * TILE * PIXEL;  // two in turn: one barrier a tile
#pragma unroll
      for (int i = 0; i < 5; i++) place[to[i]] = values[i];
      __syncthreads();
      own[0] = place[lane * PIXEL + warp];
#pragma unroll
      for (int i = 0; i < 4; i++) own[1 + i] = place[lane * PIXEL + points + 4 * warp + i];
    } else {
#pragma unroll
      for (int i = 0; i < 5; i++) own[i] = values[i];
    }
    if (tile + 1 < end) fetch(tile + 1);
    int at = tile * TILE + lane;
    if (at < pixels) merge(seen, {own[0], {1.f, coordinate(at % w, w), coordinate(at / w, h), own[1], own[2], own[3],
                                           own[4]}}, sharpness);
  }
  merge_warp(seen, sharpness);
  long long point = b * K + k;
  if (shares == 1) {
    if (mine && lane == 0) write(seen, value + 2 * point, jacobian + 4 * point);
    return;
  }

  if (mine && lane == 0) parts[point * shares + blockIdx.x] = seen;
  __threadfence();
  __syncthreads();
  unsigned* count = arrived + b * gridDim.y + blockIdx.y;
  if (threadIdx.x == 0) last = atomicAdd(count, 1u) == (unsigned)shares - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *count = 0;
  seen = {LOWEST, {}};
#pragma unroll 1
  for (int share = lane; mine && share < shares; share += 32) {
    const float4* part = (const float4*)(parts + point * shares + share);
    float4 low = __ldcg(part), high = __ldcg(part + 1);  // not what this multiprocessor may have kept
    merge(seen, {low.x, {low.y, low.z, low.w, high.x, high.y, high.z, high.w}}, sharpness);
  }
  merge_warp(seen, sharpness);
  if (mine && lane == 0) write(seen, value + 2 * point, jacobian + 4 * point);
}

// Key point by key point, one a thread: value s + scale (d - i), frame J_d J_i⁻¹ J_s.
__device__ __forceinline__ void transfer(const float* source_value, const float* source_jacobian,
                                         const float* driving_value, const float* driving_jacobian,
                                         const float* initial_value, const float* initial_jacobian, const float* scale,
                                         float* value, float* jacobian, int K, int points) {
  wait_for_earlier();
  start_later();
  int point = blockIdx.x * blockDim.x + threadIdx.x;  // of B · K
  if (point >= points) return;
  float by = scale[point / K], moved[2], s[4], d[4], n[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    s[i] = source_jacobian[4 * point + i], d[i] = driving_jacobian[4 * point + i];
    n[i] = initial_jacobian[4 * point + i];
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = 2 * point + i;
    moved[i] = fmaf(by, driving_value[at] - initial_value[at], source_value[at]);
  }
  value[2 * point] = moved[0], value[2 * point + 1] = moved[1];
  // Rounded products: the determinant of a singular matrix then is exactly zero, as the reference's is.
  float determinant = __fmul_rn(n[0], n[3]) - __fmul_rn(n[1], n[2]);
  float inverse[4] = {n[3] / determinant, -n[1] / determinant, -n[2] / determinant, n[0] / determinant}, m[4];
#pragma unroll
  for (int i = 0; i < 4; i++) m[i] = fmaf(d[i & 2], inverse[i & 1], d[(i & 2) + 1] * inverse[2 + (i & 1)]);
#pragma unroll
  for (int i = 0; i < 4; i++) jacobian[4 * point + i] = fmaf(m[i & 2], s[i & 1], m[(i & 2) + 1] * s[2 + (i & 1)]);
}

#define SOFT_KEYPOINTS(T, NAME, LAYOUT, STAGED)  \
  extern "C" __global__ void __launch_bounds__(32 * MOST_POINTS, 2) soft_keypoints_##NAME##_##LAYOUT(  \
      const T* logits, long long stride_b, int stride_c, int stride_p, float* value, float* jacobian,  \
      Seen* parts, unsigned* arrived, float sharpness, int K, int h, int w, int tiles) {  \
    soft_keypoints<T, STAGED>(logits, stride_b, stride_c, stride_p, value, jacobian, parts, arrived, sharpness, K, h,  \
                              w, tiles);  \
  }

SOFT_KEYPOINTS(float, f32, nchw, false)
SOFT_KEYPOINTS(float, f32, nhwc, true)
SOFT_KEYPOINTS(f16, f16, nchw, false)
SOFT_KEYPOINTS(f16, f16, nhwc, true)
SOFT_KEYPOINTS(bf16, bf16, nchw, false)
SOFT_KEYPOINTS(bf16, bf16, nhwc, true)

extern "C" __global__ void __launch_bounds__(128)
    transfer_f32(const float* source_value, const float* source_jacobian, const float* driving_value,
                 const float* driving_jacobian, const float* initial_value, const float* initial_jacobian,
                 const float* scale, float* value, float* jacobian, int K, int points) {
  transfer(source_value, source_jacobian, driving_value, driving_jacobian, initial_value, initial_jacobian, scale,
           value, jacobian, K, points);
}
