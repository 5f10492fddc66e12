// Flow-field warp: output[b, :, p] = occlusion[b, p] · feature[b, :, at flow[b, p]], bilinear, zeros outside.
// Three versions by the layout and the size of the feature; README.md tells the idea of each.
#include "taps.cuh"

// How many pixels' corners a thread of the channels-last version waits for at a time.
#ifndef IN_FLIGHT
#define IN_FLIGHT 2
#endif

// What one pixel samples, ready to use: the corners (indices, or `outside`) and what each counts for.
struct __align__(16) Sample {
  int corner[4];
  float weight[4];
};
template <class F> __device__ __forceinline__ Sample sample_of(const Field<F>& field, int pixel, int outside) {
  Taps taps = taps_of(field, pixel, outside);
  Sample sample{{taps.corner[0], taps.corner[1], taps.corner[2], taps.corner[3]}, {}};
  weigh(taps, sample.weight);
  return sample;
}

// ---- channels-last ----
// A block covers a tile of 2^shift × tile_height pixels (a multiple of IN_FLIGHT · blockDim.y) of one image. Threads
// along x share a pixel and take N channels each (and then the next blockDim.x · N), threads along y pixels in turn.
// Flow, coordinates and weights are worked out once a pixel; square tiles let rows of the feature meet in L1.
// Grid: (tiles along x, tiles along y, B).
template <class T, class F, int N>
__device__ __forceinline__ void warp_nhwc(const T* __restrict__ feature,  // [B, H, W, C] in memory
                                          Field<F> field, T* __restrict__ output, int C, int shift, int tile_height) {
  Sample* samples = (Sample*)dynamic_shared();  // [tile_height << shift]
  int x0 = blockIdx.x << shift, y0 = blockIdx.y * tile_height, mask = (1 << shift) - 1, pixels = tile_height << shift;
  long long image = (long long)blockIdx.z * field.H * field.W * C;
  field.select(blockIdx.z);

  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < pixels; i += blockDim.x * blockDim.y) {
    int y = y0 + (i >> shift), x = x0 + (i & mask);
    samples[i] = y < field.H && x < field.W ? sample_of(field, y * field.W + x, -1) : Sample{{-1, -1, -1, -1}, {}};
  }
  __syncthreads();

  for (int channel = threadIdx.x * N; channel < C; channel += blockDim.x * N) {
    const T* from = feature + image + channel;
    T* to = output + image + channel;
    for (int first = threadIdx.y; first < pixels; first += IN_FLIGHT * blockDim.y) {
      Run<T, N> corner[IN_FLIGHT][4];
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          int at = samples[first + j * blockDim.y].corner[k];
          corner[j][k] = load<T, N>(from + (long long)at * C, at >= 0);
        }
      }
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++) {
        int i = first + j * blockDim.y, y = y0 + (i >> shift), x = x0 + (i & mask);
        float sum[N] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float weight = samples[i].weight[k];
#pragma unroll
          for (int n = 0; n < N; n++) sum[n] = fmaf(weight, to_float(corner[j][k].value[n]), sum[n]);
        }
        if (y < field.H && x < field.W) store<T, N>(to + (long long)(y * field.W + x) * C, sum);
      }
    }
  }
}

// ---- NCHW, any size ----
// A thread owns N adjacent pixels and walks through `channels` planes with them: coordinates once, loads of
// neighbouring threads near each other, the loads of several planes in flight.
// Grid: (blocks of pixels, groups of channels, B).
template <class T, int N, bool INSIDE>
__device__ __forceinline__ void walk(const T* __restrict__ plane, T* __restrict__ output, const Sample (&sample)[N],
                                     int channels, int HW, bool active) {
#pragma unroll 4
  for (int c = 0; c < channels; c++) {
    float sum[N] = {};
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int at = sample[n].corner[k];
        float value = INSIDE || at >= 0 ? to_float(plane[at]) : 0.f;
        sum[n] = fmaf(sample[n].weight[k], value, sum[n]);
      }
    }
    if (active) store<T, N>(output, sum);
    plane += HW;
    output += HW;
  }
}
template <class T, class F, int N>
__device__ __forceinline__ void warp_nchw(const T* __restrict__ feature,  // [B, C, H, W]
                                          Field<F> field, T* __restrict__ output, int C, int channels) {
  int HW = field.H * field.W, own = (blockIdx.x * blockDim.x + threadIdx.x) * N, channel = blockIdx.y * channels;
  int pixel = min(own, HW - N);  // threads past the end go along, for the vote below
  field.select(blockIdx.z);

  Sample sample[N];
  bool inside = true;
#pragma unroll
  for (int n = 0; n < N; n++) {
    sample[n] = sample_of(field, pixel + n, -1);
#pragma unroll
    for (int k = 0; k < 4; k++) inside = inside && sample[n].corner[k] >= 0;
  }
  long long start = ((long long)blockIdx.z * C + channel) * HW;
  channels = min(channels, C - channel);
  if (__all_sync(0xffffffffu, inside)) {
    walk<T, N, true>(feature + start, output + start + pixel, sample, channels, HW, own < HW);
  } else {
    walk<T, N, false>(feature + start, output + start + pixel, sample, channels, HW, own < HW);
  }
}

// ---- NCHW, planes that fit in shared memory ----
// A block brings whole planes of G channels to shared memory, the G channels of a pixel side by side (BYTES), and
// samples from there: device memory is read once, in order, whatever the flow, and before the flow is known.
// It does so for `groups` groups of G channels, one after the other. Threads own pairs of pixels.
// H · W must be even, C a multiple of G.
// Grid: (parts of the channels, 1, B).
template <class T, class F, int BYTES>
__device__ __forceinline__ void warp_planes(const T* __restrict__ feature,  // [B, C, H, W]
                                            Field<F> field, T* __restrict__ output, int C, int groups) {
  constexpr int G = BYTES / sizeof(T);
  Run<T, G>* plane = (Run<T, G>*)dynamic_shared();  // [H · W + 1]
  int HW = field.H * field.W, first = blockIdx.x * G * groups, last = min(first + G * groups, C);
  field.select(blockIdx.z);
  feature += (long long)blockIdx.z * C * HW;
  output += (long long)blockIdx.z * C * HW;
  // Threads a pair apart would meet in the same banks: half of those served at a time take the second pixel first.
  int second = (threadIdx.x & 64 / BYTES) != 0;
  if (threadIdx.x == 0) plane[HW] = {};  // all that lies outside

  for (int channel = first; channel < last; channel += G) {
    const T* from = feature + (long long)channel * HW;
    T* to = output + (long long)channel * HW;
    __syncthreads();  // the group before has been sampled
    for (int pair = threadIdx.x; pair < HW / 2; pair += blockDim.x) {
      Run<T, 2> both[G];
      const T* at = from + 2 * pair;
#pragma unroll
      for (int g = 0; g < G; g++, at += HW) both[g] = load<T, 2>(at);
      Run<T, G> pixel[2];
#pragma unroll
      for (int g = 0; g < G; g++) {
        pixel[0].value[g] = both[g].value[0];
        pixel[1].value[g] = both[g].value[1];
      }
      plane[2 * pair + second] = second ? pixel[1] : pixel[0];
      plane[2 * pair + 1 - second] = second ? pixel[0] : pixel[1];
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < HW / 2; pair += blockDim.x) {
      float sum[2][G] = {};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Sample sample = sample_of(field, 2 * pair + (i ^ second), HW);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          Run<T, G> corner = plane[sample.corner[k]];
#pragma unroll
          for (int g = 0; g < G; g++) sum[i][g] = fmaf(sample.weight[k], to_float(corner.value[g]), sum[i][g]);
        }
      }
      T* at = to + 2 * pair;
#pragma unroll
      for (int g = 0; g < G; g++, at += HW) {
        float both[2] = {second ? sum[1][g] : sum[0][g], second ? sum[0][g] : sum[1][g]};
        store<T, 2>(at, both);
      }
    }
  }
}

// ---- entry points ----
#define NHWC(T, F, N, NAME)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                                \
      flow_warp_##NAME(const T* __restrict__ feature, FIELD_PARAMETERS(F), T* __restrict__ output, int C, int shift,  \
                       int tile_height) {                                                                             \
    warp_nhwc<T, F, N>(feature, FIELD(F), output, C, shift, tile_height);                                             \
  }
#define NCHW(T, F, N, NAME)                                                                                           \
  extern "C" __global__ void __launch_bounds__(128)                                                                   \
      flow_warp_##NAME(const T* __restrict__ feature, FIELD_PARAMETERS(F), T* __restrict__ output, int C,             \
                       int channels) {                                                                                \
    warp_nchw<T, F, N>(feature, FIELD(F), output, C, channels);                                                       \
  }
#define PLANES(T, F, BYTES, NAME)                                                                                     \
  extern "C" __global__ void __launch_bounds__(512, 2)                                                                \
      flow_warp_##NAME(const T* __restrict__ feature, FIELD_PARAMETERS(F), T* __restrict__ output, int C,             \
                       int groups) {                                                                                  \
    warp_planes<T, F, BYTES>(feature, FIELD(F), output, C, groups);                                                   \
  }
// flow_warp_<dtype of the feature>_<dtype of the flow>_<version>
#define FLOW_WARP(T, F, NAME)                                                                                         \
  NHWC(T, F, 1, NAME##_nhwc)                                                                                          \
  NHWC(T, F, 16 / sizeof(T), NAME##_nhwc_vector)                                                                      \
  NCHW(T, F, 1, NAME##_nchw)                                                                                          \
  NCHW(T, F, 2, NAME##_nchw_pairs)                                                                                    \
  PLANES(T, F, 4, NAME##_planes_4)                                                                                    \
  PLANES(T, F, 16, NAME##_planes_16)

#ifdef PLUGIN
#include "plugin.cuh"
#else
FLOW_WARP(float, float, f32_f32)
FLOW_WARP(f16, float, f16_f32)
FLOW_WARP(f16, f16, f16_f16)
FLOW_WARP(bf16, float, bf16_f32)
FLOW_WARP(bf16, bf16, bf16_bf16)
#endif
