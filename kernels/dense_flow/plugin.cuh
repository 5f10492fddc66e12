// The kernel as TensorRT calls it: the input tensors, their sizes, the output tensors; all contiguous.
// Grid: (h · w / 32, B), 256 threads.
#include "plugin_element.cuh"

extern "C" __global__ void __launch_bounds__(PIXELS* GROUPS)
    PLUGIN_NAME(dense_flow)(const Element* __restrict__ mask,            // [B, K + 1, h, w]
                            const Element* __restrict__ occlusion,       // [B, 1, h, w]
                            const float* __restrict__ source_value,      // [B, K, 2]
                            const float* __restrict__ source_jacobian,   // [B, K, 2, 2]
                            const float* __restrict__ driving_value,     // [B, K, 2]
                            const float* __restrict__ driving_jacobian,  // [B, K, 2, 2]
                            int K, int h, int w,
                            float* __restrict__ flow,        // [B, h, w, 2], (x, y)
                            float* __restrict__ visible) {  // [B, 1, h, w]
  long long pixels = (long long)h * w;
  dense_flow<Element, false>(mask, occlusion, source_value, source_jacobian, driving_value, driving_jacobian, flow,
                             visible, (K + 1) * pixels, pixels, w, 1, pixels, w, 1, K, h, w);
}
