// The kernel as TensorRT calls it: the input tensors, their sizes, the output tensor; all contiguous.
// Grid: (H · W / 128, C / PLUGIN_CHANNELS, B), 128 threads.
#include "plugin_element.cuh"

constexpr int PLUGIN_CHANNELS = 16;  // of a block

extern "C" __global__ void __launch_bounds__(128)
    PLUGIN_NAME(flow_warp)(const Element* __restrict__ feature,  // [B, C, H, W]
                           const float* __restrict__ flow,       // [B, h, w, 2]
                           const float* __restrict__ occlusion,  // [B, 1, h, w]
                           int C, int H, int W, int h, int w, int align_corners,
                           Element* __restrict__ output) {  // [B, C, H, W]
  Field<float> field{flow, occlusion, h, w, H, W, align_corners, (float)h / H, (float)w / W, 1, 2, 1,
                     2LL * h * w, (long long)h * w};
  warp_nchw<Element, float, 1>(feature, field, output, C, PLUGIN_CHANNELS);
}
