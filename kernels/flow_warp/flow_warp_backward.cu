// Gradients of the flow-field warp. Sums are float32 atomics into zeroed buffers, so their last bits vary from run to
// run; whoever calls casts them to the dtypes of the inputs. A null buffer's gradient is not worked out.
#include "taps.cuh"

struct Gradients {
  float* feature;    // laid out as the feature
  float* flow;       // [B, h, w, 2]
  float* occlusion;  // [B, 1, h, w]

  __device__ __forceinline__ void select(int batch, long long feature_size, int field_size) {
    if (feature) feature += batch * feature_size;
    if (flow) flow += 2LL * batch * field_size;
    if (occlusion) occlusion += (long long)batch * field_size;
  }
  __device__ __forceinline__ bool of_field() const { return flow || occlusion; }
};

// dot[k]: the output's gradient at this pixel times the feature at corner k, summed over channels (0 outside).
template <class F>
__device__ __forceinline__ void add_field_gradients(const Field<F>& field, const Gradients& gradients, int pixel,
                                                    const Taps& taps, const float (&dot)[4]) {
  float u = taps.u, v = taps.v;
  float x = taps.occlusion * field.x_scale() * ((1 - v) * (dot[1] - dot[0]) + v * (dot[3] - dot[2]));
  float y = taps.occlusion * field.y_scale() * ((1 - u) * (dot[2] - dot[0]) + u * (dot[3] - dot[1]));
  float occlusion = (1 - v) * ((1 - u) * dot[0] + u * dot[1]) + v * ((1 - u) * dot[2] + u * dot[3]);
  Cells cells = {{pixel}, {1}};
  if (field.resized()) cells = cells_around(field, pixel);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i > 0 && !field.resized()) break;
    int at = cells.at[i];
    if (gradients.flow) {
      atomicAdd(gradients.flow + 2LL * at, cells.share[i] * x);
      atomicAdd(gradients.flow + 2LL * at + 1, cells.share[i] * y);
    }
    if (gradients.occlusion) atomicAdd(gradients.occlusion + at, cells.share[i] * occlusion);
  }
}

template <int N> __device__ __forceinline__ void atomic_add(float* to, const float (&values)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int n = 0; n < N; n += 4) atomic_add_4(to + n, values[n], values[n + 1], values[n + 2], values[n + 3]);
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) atomicAdd(to + n, values[n]);
  }
}

// ---- channels-last: tiles and threads as in the forward pass; blockDim.x is a power of two, at most a warp ----
// The threads of a pixel sum the dots of their channels by shuffles; one of them adds the gradients of the flow.
template <class T, class F, int N>
__device__ __forceinline__ void backward_nhwc(const T* __restrict__ grad_output,  // [B, H, W, C] in memory
                                              const T* __restrict__ feature,      // [B, H, W, C] in memory
                                              Field<F> field, Gradients gradients, int C, int shift, int tile_height) {
  Taps* taps_of_tile = (Taps*)dynamic_shared();  // [tile_height << shift]
  int x0 = blockIdx.x << shift, y0 = blockIdx.y * tile_height, mask = (1 << shift) - 1, pixels = tile_height << shift;
  long long image = (long long)field.H * field.W * C;
  grad_output += blockIdx.z * image;
  feature += blockIdx.z * image;
  field.select(blockIdx.z);
  gradients.select(blockIdx.z, image, field.h * field.w);

  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < pixels; i += blockDim.x * blockDim.y) {
    int y = y0 + (i >> shift), x = x0 + (i & mask);
    taps_of_tile[i] =
        y < field.H && x < field.W ? taps_of(field, y * field.W + x, -1) : Taps{{-1, -1, -1, -1}, 0, 0, 0};
  }
  __syncthreads();

  for (int i = threadIdx.y; i < pixels; i += blockDim.y) {  // `pixels` is a multiple: whole warps stay together
    int y = y0 + (i >> shift), x = x0 + (i & mask), pixel = y * field.W + x;
    bool active = y < field.H && x < field.W;
    Taps taps = taps_of_tile[i];
    float weight[4], dot[4] = {};
    weigh(taps, weight);
    for (int channel = threadIdx.x * N; channel < C; channel += blockDim.x * N) {
      Run<T, N> gradient = load<T, N>(grad_output + (long long)pixel * C + channel, active);
      if (gradients.of_field()) {
        Run<T, N> corner[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          corner[k] = load<T, N>(feature + (long long)taps.corner[k] * C + channel, taps.corner[k] >= 0);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
          for (int n = 0; n < N; n++) dot[k] = fmaf(to_float(gradient.value[n]), to_float(corner[k].value[n]), dot[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (!gradients.feature || taps.corner[k] < 0) continue;
        float shares[N];
#pragma unroll
        for (int n = 0; n < N; n++) shares[n] = weight[k] * to_float(gradient.value[n]);
        atomic_add<N>(gradients.feature + (long long)taps.corner[k] * C + channel, shares);
      }
    }
    if (!gradients.of_field()) continue;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      for (int lanes = blockDim.x / 2; lanes > 0; lanes /= 2) dot[k] += __shfl_xor_sync(0xffffffffu, dot[k], lanes);
    }
    if (active && threadIdx.x == 0) add_field_gradients(field, gradients, pixel, taps, dot);
  }
}

// ---- NCHW: a thread owns a pixel and walks through `channels` planes. Grid: (blocks of pixels, groups of channels, B)
template <class T, class F>
__device__ __forceinline__ void backward_nchw(const T* __restrict__ grad_output,  // [B, C, H, W]
                                              const T* __restrict__ feature,      // [B, C, H, W]
                                              Field<F> field, Gradients gradients, int C, int channels) {
  int HW = field.H * field.W, pixel = blockIdx.x * blockDim.x + threadIdx.x, channel = blockIdx.y * channels;
  if (pixel >= HW) return;
  long long image = (long long)C * HW, first = blockIdx.z * image + (long long)channel * HW;
  grad_output += first + pixel;
  feature += first;
  field.select(blockIdx.z);
  gradients.select(blockIdx.z, image, field.h * field.w);
  if (gradients.feature) gradients.feature += (long long)channel * HW;

  Taps taps = taps_of(field, pixel, -1);
  float weight[4], dot[4] = {};
  weigh(taps, weight);
  channels = min(channels, C - channel);
#pragma unroll 4
  for (int c = 0; c < channels; c++) {
    long long plane = (long long)c * HW;
    float gradient = to_float(grad_output[plane]);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (taps.corner[k] < 0) continue;
      long long at = plane + taps.corner[k];
      if (gradients.of_field()) dot[k] = fmaf(gradient, to_float(feature[at]), dot[k]);
      if (gradients.feature) atomicAdd(gradients.feature + at, weight[k] * gradient);
    }
  }
  if (gradients.of_field()) add_field_gradients(field, gradients, pixel, taps, dot);
}

// ---- entry points ----
#define NHWC(T, F, N, NAME)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                                   \
      flow_warp_backward_##NAME(const T* __restrict__ grad_output, const T* __restrict__ feature,                     \
                                FIELD_PARAMETERS(F), float* grad_feature, float* grad_flow, float* grad_occlusion,    \
                                int C, int shift, int tile_height) {                                                  \
    backward_nhwc<T, F, N>(grad_output, feature, FIELD(F), {grad_feature, grad_flow, grad_occlusion}, C, shift,       \
                           tile_height);                                                                              \
  }
#define NCHW(T, F, NAME)                                                                                              \
  extern "C" __global__ void __launch_bounds__(128)                                                                   \
      flow_warp_backward_##NAME(const T* __restrict__ grad_output, const T* __restrict__ feature,                     \
                                FIELD_PARAMETERS(F), float* grad_feature, float* grad_flow, float* grad_occlusion,    \
                                int C, int channels) {                                                                \
    backward_nchw<T, F>(grad_output, feature, FIELD(F), {grad_feature, grad_flow, grad_occlusion}, C, channels);      \
  }
// flow_warp_backward_<dtype of the feature>_<dtype of the flow>_<version>
#define FLOW_WARP_BACKWARD(T, F, NAME)                                                                                \
  NHWC(T, F, 1, NAME##_nhwc)                                                                                          \
  NHWC(T, F, 16 / sizeof(T), NAME##_nhwc_vector)                                                                      \
  NCHW(T, F, NAME##_nchw)

FLOW_WARP_BACKWARD(float, float, f32_f32)
FLOW_WARP_BACKWARD(f16, float, f16_f32)
FLOW_WARP_BACKWARD(f16, f16, f16_f16)
FLOW_WARP_BACKWARD(bf16, float, bf16_f32)
FLOW_WARP_BACKWARD(bf16, bf16, bf16_bf16)
