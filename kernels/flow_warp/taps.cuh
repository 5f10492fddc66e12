// Where a pixel of the output comes from: its flow and occlusion (resized on the fly), and the four pixels of the
// feature around the place the flow points at. Shared by the forward and the backward kernels.
#pragma once

#include "ptx.cuh"

// N consecutive values, aligned to their size: one load or store moves them all.
template <class T, int N> struct __align__(sizeof(T) * N) Run {
  T value[N];
};

template <class T, int N> __device__ __forceinline__ Run<T, N> load(const T* from) { return *(const Run<T, N>*)from; }
// Zeros where not `valid`.
template <class T, int N> __device__ __forceinline__ Run<T, N> load(const T* from, bool valid) {
  Run<T, N> run = {};
  if constexpr (sizeof(run) == 16) {
    uint4 raw = load_16(from, valid);
    run = *(Run<T, N>*)&raw;
  } else {
    if (valid) run = load<T, N>(from);
  }
  return run;
}

template <class T, int N> __device__ __forceinline__ void store(T* to, const float (&values)[N]) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    Run<unsigned, N / 2> words;
#pragma unroll
    for (int i = 0; i < N / 2; i++) words.value[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    *(Run<unsigned, N / 2>*)to = words;
  } else {
    Run<T, N> run;
#pragma unroll
    for (int i = 0; i < N; i++) run.value[i] = from_float<T>(values[i]);
    *(Run<T, N>*)to = run;
  }
}

// The flow [B, h, w, 2] and the occlusion [B, 1, h, w] (or null: 1 everywhere) of one image [H, W] of the batch.
// Strides in elements: from x to y of a pixel's flow, from one pixel to the next, from one image to the next.
// v_step = h / H and u_step = w / W: cells of the field from one pixel of the image to the next.
template <class F> struct Field {
  const F* flow;
  const F* occlusion;
  int h, w, H, W, align_corners;
  float v_step, u_step;
  int flow_component, flow_pixel, occlusion_pixel;
  long long flow_batch, occlusion_batch;

  __device__ __forceinline__ void select(int batch) {
    flow += batch * flow_batch;
    if (occlusion) occlusion += batch * occlusion_batch;
  }
  __device__ __forceinline__ bool resized() const { return h != H || w != W; }
  // Pixels of the feature that 1 of flow spans, horizontally and vertically.
  __device__ __forceinline__ float x_scale() const { return 0.5f * (align_corners ? W - 1 : W); }
  __device__ __forceinline__ float y_scale() const { return 0.5f * (align_corners ? H - 1 : H); }
};

// The four cells of a field [h, w] that a pixel of the image [H, W] is interpolated from, and the share of each
// (F.interpolate, bilinear, align_corners=False).
struct Cells {
  int at[4];
  float share[4];
};
template <class F> __device__ __forceinline__ Cells cells_around(const Field<F>& field, int pixel) {
  int y = pixel / field.W, x = pixel - y * field.W;
  float v = fmaxf(fmaf(y + 0.5f, field.v_step, -0.5f), 0.f);
  float u = fmaxf(fmaf(x + 0.5f, field.u_step, -0.5f), 0.f);
  int top = min((int)v, field.h - 1), bottom = min(top + 1, field.h - 1);
  int left = min((int)u, field.w - 1), right = min(left + 1, field.w - 1);
  v -= top;
  u -= left;
  return {{top * field.w + left, top * field.w + right, bottom * field.w + left, bottom * field.w + right},
          {(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u}};
}

template <class F> __device__ __forceinline__ float mix(const F* values, int stride, const Cells& cells) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) sum = fmaf(cells.share[i], to_float(values[(long long)cells.at[i] * stride]), sum);
  return sum;
}

// What one pixel samples: corners 0 to 3 are the upper left, upper right, lower left and lower right pixel around the
// place, as indices into the image [H, W], or `outside`. The place is at (u, v) in [0, 1) between them.
struct __align__(16) Taps {
  int corner[4];
  float u, v, occlusion;
};
template <class F> __device__ __forceinline__ Taps taps_of(const Field<F>& field, int pixel, int outside) {
  float x, y, occlusion = 1;
  if (field.resized()) {
    Cells cells = cells_around(field, pixel);
    x = mix(field.flow, field.flow_pixel, cells);
    y = mix(field.flow + field.flow_component, field.flow_pixel, cells);
    if (field.occlusion) occlusion = mix(field.occlusion, field.occlusion_pixel, cells);
  } else {
    const F* flow = field.flow + (long long)pixel * field.flow_pixel;
    x = to_float(flow[0]);
    y = to_float(flow[field.flow_component]);
    if (field.occlusion) occlusion = to_float(field.occlusion[(long long)pixel * field.occlusion_pixel]);
  }
  x = fmaf(x, field.x_scale(), 0.5f * (field.W - 1));
  y = fmaf(y, field.y_scale(), 0.5f * (field.H - 1));
  // False of NaN too. Decided in float: the place may be too far off for an int.
  if (!(x >= -1 && x < field.W && y >= -1 && y < field.H)) return {{outside, outside, outside, outside}, 0, 0, occlusion};

  int left = (int)floorf(x), top = (int)floorf(y), at = top * field.W + left;
  bool left_inside = left >= 0, right_inside = left + 1 < field.W;
  bool top_inside = top >= 0, bottom_inside = top + 1 < field.H;
  return {{top_inside && left_inside ? at : outside, top_inside && right_inside ? at + 1 : outside,
           bottom_inside && left_inside ? at + field.W : outside,
           bottom_inside && right_inside ? at + field.W + 1 : outside},
          x - left, y - top, occlusion};
}

// What each corner counts for in the output.
__device__ __forceinline__ void weigh(const Taps& taps, float (&weight)[4]) {
  float lower = taps.v * taps.occlusion, upper = (1 - taps.v) * taps.occlusion;
  weight[0] = upper * (1 - taps.u);
  weight[1] = upper * taps.u;
  weight[2] = lower * (1 - taps.u);
  weight[3] = lower * taps.u;
}

// How an entry point takes a field, and makes it.
#define FIELD_PARAMETERS(F)                                                                                           \
  const F *__restrict__ flow, const F *__restrict__ occlusion, int h, int w, int H, int W, int align_corners,         \
      float v_step, float u_step, int flow_component, int flow_pixel, int occlusion_pixel, long long flow_batch,      \
      long long occlusion_batch
#define FIELD(F)                                                                                                      \
  Field<F> {                                                                                                          \
    flow, occlusion, h, w, H, W, align_corners, v_step, u_step, flow_component, flow_pixel, occlusion_pixel,          \
        flow_batch, occlusion_batch                                                                                   \
  }
