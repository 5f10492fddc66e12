// The motion estimator's input in one launch: for the background and each key point its heat map (driving - source)
// and the thumbnail moved by its motion. README.md lists the versions.
//
// A block takes 32 pixels and all K + 1 motions, a thread one pixel of one motion at a time. What depends on the key
// points alone (J_s J_d⁻¹, the Gaussians along each axis) is computed once a block, in shared memory.
#include "motion.cuh"
#include "types.cuh"

constexpr int PIXELS = 32;  // a block's
constexpr int MOST_THREADS = 512;

struct Tile { int width, height; };
// NCHW: for each channel a warp writes rows of 16, whole sectors. NHWC: a thread writes 4 channels at once and its
// neighbours the next 4, so the tile is the one with the fewest places along both axes.
template <bool NHWC> constexpr Tile TILE = NHWC ? Tile{8, 4} : Tile{16, 2};

// The four channels of a motion at once (__stcg, since the compiler splits plain stores here).
__device__ __forceinline__ void store_channels(float* target, float heat, const float (&colour)[3]) {
  __stcg((float4*)target, make_float4(heat, colour[0], colour[1], colour[2]));
}
template <class T> __device__ __forceinline__ void store_channels(T* target, float heat, const float (&colour)[3]) {
  __stcg((uint2*)target, make_uint2(pack<T>(heat, colour[0]), pack<T>(colour[1], colour[2])));
}

// exp(-(distance)² / (2 · 0.01)) of one axis.
__device__ __forceinline__ float gaussian(float distance) { return expf(-50.f * distance * distance); }

// Bilinear sample of `thumbnail` at `flow`, zeros outside and where the flow is not finite. Strides in elements.
template <class T>
__device__ __forceinline__ void sample(float (&colour)[3], const T* __restrict__ thumbnail, int stride_c, int stride_y,
                                       int stride_x, int h, int w, float2 flow) {
  float x = ((flow.x + 1.f) * (float)w - 1.f) * 0.5f, y = ((flow.y + 1.f) * (float)h - 1.f) * 0.5f;
  colour[0] = colour[1] = colour[2] = 0.f;
  if (!(x > -1.f && x < (float)w && y > -1.f && y < (float)h)) return;  // so written that NaN leaves here
  int left = __float2int_rd(x), top = __float2int_rd(y);
  float right_share = x - (float)left, bottom_share = y - (float)top;
#pragma unroll
  for (int corner = 0; corner < 4; corner++) {
    int column = left + (corner & 1), row = top + (corner >> 1);
    bool inside = column >= 0 && column < w && row >= 0 && row < h;
    float weight = (corner & 1 ? right_share : 1.f - right_share) * (corner >> 1 ? bottom_share : 1.f - bottom_share);
    const T* at = thumbnail + (inside ? row * stride_y + column * stride_x : 0);  // read anyway: no branch, no wait
#pragma unroll
    for (int c = 0; c < 3; c++) {
      float value = to_float(at[c * stride_c]);
      colour[c] = fmaf(inside ? weight : 0.f, inside ? value : 0.f, colour[c]);
    }
  }
}

template <class T, bool NHWC>
__device__ __forceinline__ void sparse_motion(const T* __restrict__ thumbnail,  // [B, 3, h, w], of the strides below
                                              const float* __restrict__ source_value,      // [B, K, 2]
                                              const float* __restrict__ source_jacobian,   // [B, K, 2, 2]
                                              const float* __restrict__ driving_value,     // [B, K, 2]
                                              const float* __restrict__ driving_jacobian,  // [B, K, 2, 2]
                                              T* __restrict__ stacked,  // [B, 4 (K + 1), h, w]
                                              long long stride_b, int stride_c, int stride_y, int stride_x, int K,
                                              int h, int w) {
  constexpr Tile tile = TILE<NHWC>;
  constexpr int PLACES = tile.width + tile.height;  // columns, then rows
  __shared__ KeyPoints key_points;
  __shared__ Motions motions;
  __shared__ float coordinates[PLACES];
  // Gaussians of (driving, source) at each place; one column more than motions, against bank conflicts across places.
  __shared__ float2 gaussians[PLACES][MOST_MOTIONS + 1];

  int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  int points = K + 1, left = blockIdx.x * tile.width, top = blockIdx.y * tile.height;
  long long b = blockIdx.z;
  load_key_points(key_points, thread, threads, K, source_value + b * K * 2, source_jacobian + b * K * 4,
                  driving_value + b * K * 2, driving_jacobian + b * K * 4);
#pragma unroll 1
  for (int place = thread; place < PLACES; place += threads)
    coordinates[place] = place < tile.width ? coordinate(left + place, w) : coordinate(top + place - tile.width, h);
  __syncthreads();

#pragma unroll 1
  for (int i = thread; i < PLACES * points; i += threads) {
    int k = i / PLACES, place = i % PLACES, axis = place < tile.width ? 0 : 1;
    float2 both = make_float2(0.f, 0.f);  // the background's heat map is zero
    if (k > 0)
      both = make_float2(gaussian(coordinates[place] - key_points.driving_value[2 * (k - 1) + axis]),
                         gaussian(coordinates[place] - key_points.source_value[2 * (k - 1) + axis]));
    gaussians[place][k] = both;
  }
  // By the last warps, which have the fewest Gaussians.
#pragma unroll 1
  for (int i = threads - 1 - thread; i < 4 * points; i += threads) compute_motion(motions, i / 4, i % 4, key_points);
  __syncthreads();

  thumbnail += b * stride_b;
  long long pixels = (long long)h * w;
  stacked += b * 4 * points * pixels;
  // Neighbours in a block are neighbours in memory: pixels (32 × motions threads), or motions (K + 1 × pixels threads).
#pragma unroll 1
  for (int k = NHWC ? threadIdx.x : threadIdx.y; k < points; k += NHWC ? points : blockDim.y) {
#pragma unroll 1
    for (int pixel = NHWC ? threadIdx.y : threadIdx.x; pixel < PIXELS; pixel += NHWC ? blockDim.y : PIXELS) {
      int column = pixel % tile.width, row = pixel / tile.width, x = left + column, y = top + row;
      if (x >= w || y >= h) continue;
      float2 across = gaussians[column][k], down = gaussians[tile.width + row][k];
      // Rounded products: the heat map of a point that stays is exactly zero, as the reference's is.
      float heat = __fmul_rn(across.x, down.x) - __fmul_rn(across.y, down.y);
      float2 to = move(motions, k, coordinates[column], coordinates[tile.width + row]);
      float colour[3];
      sample(colour, thumbnail, stride_c, stride_y, stride_x, h, w, to);
      long long at = (long long)y * w + x;
      if constexpr (NHWC) {
        store_channels(stacked + (at * points + k) * 4, heat, colour);
      } else {
        T* target = stacked + 4 * k * pixels + at;
        target[0] = from_float<T>(heat);
#pragma unroll
        for (int c = 0; c < 3; c++) target[(c + 1) * pixels] = from_float<T>(colour[c]);
      }
    }
  }
}

#define SPARSE_MOTION(T, NAME, LAYOUT, NHWC)  \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS) sparse_motion_##NAME##_##LAYOUT(  \
      const T* thumbnail, const float* source_value, const float* source_jacobian, const float* driving_value,  \
      const float* driving_jacobian, T* stacked, long long stride_b, int stride_c, int stride_y, int stride_x, int K,  \
      int h, int w) {  \
    wait_for_earlier();  \
    start_later();  \
    sparse_motion<T, NHWC>(thumbnail, source_value, source_jacobian, driving_value, driving_jacobian, stacked,  \
                           stride_b, stride_c, stride_y, stride_x, K, h, w);  \
  }

#ifdef PLUGIN
#include "plugin.cuh"
#else
SPARSE_MOTION(float, f32, nchw, false)
SPARSE_MOTION(float, f32, nhwc, true)
SPARSE_MOTION(f16, f16, nchw, false)
SPARSE_MOTION(f16, f16, nhwc, true)
SPARSE_MOTION(bf16, bf16, nchw, false)
SPARSE_MOTION(bf16, bf16, nhwc, true)
#endif
