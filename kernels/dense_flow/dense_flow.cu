// The motion estimator's last step in one launch: the softmax of the mask's K + 1 logits weighs the motions of the
// background and the key points, which are computed again rather than read; the occlusion's logit goes through a
// sigmoid. README.md lists the versions.
//
// A block takes 32 pixels, and 8 threads share a pixel: thread `group` takes motions group, group + 8, …, so that even
// one face of 64 × 64 fills a GPU. Each keeps its own maximum and sums; they are merged at the end.
#include "motion.cuh"
#include "types.cuh"

constexpr int PIXELS = 32;  // a block's
constexpr int GROUPS = 8;   // threads of a pixel
constexpr int EACH = MOST_MOTIONS / GROUPS;

// CHANNELS_CLOSE: neighbours in memory are channels of a pixel (channels-last), so that a pixel's threads are
// neighbours; otherwise pixels are. Either way every stride is right.
template <class T, bool CHANNELS_CLOSE>
__device__ __forceinline__ void dense_flow(const T* __restrict__ mask,       // [B, K + 1, h, w]
                                           const T* __restrict__ occlusion,  // [B, 1, h, w]
                                           const float* __restrict__ source_value,      // [B, K, 2]
                                           const float* __restrict__ source_jacobian,   // [B, K, 2, 2]
                                           const float* __restrict__ driving_value,     // [B, K, 2]
                                           const float* __restrict__ driving_jacobian,  // [B, K, 2, 2]
                                           float* __restrict__ flow,                    // [B, h, w, 2], (x, y)
                                           float* __restrict__ visible,                 // [B, 1, h, w]
                                           long long mask_b, long long mask_c, long long mask_y, long long mask_x,
                                           long long occlusion_b, long long occlusion_y, long long occlusion_x, int K,
                                           int h, int w) {
  __shared__ KeyPoints key_points;
  __shared__ Motions motions;
  __shared__ float4 partial[GROUPS][PIXELS + 1];  // maximum, Σ e, Σ e x, Σ e y

  const float infinity = __int_as_float(0x7f800000);
  int points = K + 1, pixels = h * w, first = blockIdx.x * PIXELS;
  int lane = CHANNELS_CLOSE ? threadIdx.x / GROUPS : threadIdx.x % PIXELS;
  int group = CHANNELS_CLOSE ? threadIdx.x % GROUPS : threadIdx.x / PIXELS;
  long long b = blockIdx.y;
  int pixel = first + lane, y = pixel / w, x = pixel % w;
  bool inside = pixel < pixels;

  // All the loads of a thread are under way before it waits for any.
  float logit[EACH], occlusion_logit = 0.f;
  const T* place = mask + b * mask_b + y * mask_y + x * mask_x;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int k = group + j * GROUPS;
    logit[j] = inside && k < points ? to_float(place[k * mask_c]) : -infinity;
  }
  if (inside && group == GROUPS - 1)
    occlusion_logit = to_float(occlusion[b * occlusion_b + y * occlusion_y + x * occlusion_x]);
  load_key_points(key_points, threadIdx.x, blockDim.x, K, source_value + b * K * 2, source_jacobian + b * K * 4,
                  driving_value + b * K * 2, driving_jacobian + b * K * 4);
  __syncthreads();
  if ((int)threadIdx.x < 4 * points) compute_motion(motions, threadIdx.x / 4, threadIdx.x % 4, key_points);
  float across = coordinate(x, w), down = coordinate(y, h);
  __syncthreads();

  float maximum = -infinity;
#pragma unroll
  for (int j = 0; j < EACH; j++) maximum = fmaxf(maximum, logit[j]);
  float base = maximum == -infinity ? 0.f : maximum;  // -infinity - -infinity would be NaN
  float4 sums = make_float4(maximum, 0.f, 0.f, 0.f);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int k = group + j * GROUPS;
    if (k >= points) break;
    float e = expf(logit[j] - base);
    float2 to = move(motions, k, across, down);
    sums.y += e;
    sums.z = fmaf(e, to.x, sums.z);
    sums.w = fmaf(e, to.y, sums.w);
  }
  partial[group][lane] = sums;
  if (inside && group == GROUPS - 1) visible[b * pixels + pixel] = 1.f / (1.f + expf(-occlusion_logit));
  __syncthreads();

  pixel = first + threadIdx.x;
  if (threadIdx.x >= PIXELS || pixel >= pixels) return;
  maximum = -infinity;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) maximum = fmaxf(maximum, partial[g][threadIdx.x].x);
  base = maximum == -infinity ? 0.f : maximum;
  float total = 0.f, sum_x = 0.f, sum_y = 0.f;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    float4 part = partial[g][threadIdx.x];
    float scale = expf(part.x - base);
    total = fmaf(scale, part.y, total);
    sum_x = fmaf(scale, part.z, sum_x);
    sum_y = fmaf(scale, part.w, sum_y);
  }
  ((float2*)flow)[b * pixels + pixel] = make_float2(sum_x / total, sum_y / total);
}

#define DENSE_FLOW(T, NAME, LAYOUT, CHANNELS_CLOSE)  \
  extern "C" __global__ void __launch_bounds__(PIXELS* GROUPS) dense_flow_##NAME##_##LAYOUT(  \
      const T* mask, const T* occlusion, const float* source_value, const float* source_jacobian,  \
      const float* driving_value, const float* driving_jacobian, float* flow, float* visible, long long mask_b,  \
      long long mask_c, long long mask_y, long long mask_x, long long occlusion_b, long long occlusion_y,  \
      long long occlusion_x, int K, int h, int w) {  \
    wait_for_earlier();  \
    start_later();  \
    dense_flow<T, CHANNELS_CLOSE>(mask, occlusion, source_value, source_jacobian, driving_value, driving_jacobian,  \
                                  flow, visible, mask_b, mask_c, mask_y, mask_x, occlusion_b, occlusion_y,  \
                                  occlusion_x, K, h, w);  \
  }

#ifdef PLUGIN
#include "plugin.cuh"
#else
DENSE_FLOW(float, f32, nchw, false)
DENSE_FLOW(float, f32, nhwc, true)
DENSE_FLOW(f16, f16, nchw, false)
DENSE_FLOW(f16, f16, nhwc, true)
DENSE_FLOW(bf16, bf16, nchw, false)
DENSE_FLOW(bf16, bf16, nhwc, true)
#endif
