// The kernel as TensorRT calls it: the input tensors, their sizes, the output tensor; all contiguous.
// Grid: (w / 16, h / 2, B), 512 threads.
#include "plugin_element.cuh"

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    PLUGIN_NAME(sparse_motion)(const Element* __restrict__ thumbnail,       // [B, 3, h, w]
                               const float* __restrict__ source_value,      // [B, K, 2]
                               const float* __restrict__ source_jacobian,   // [B, K, 2, 2]
                               const float* __restrict__ driving_value,     // [B, K, 2]
                               const float* __restrict__ driving_jacobian,  // [B, K, 2, 2]
                               int K, int h, int w,
                               Element* __restrict__ stacked) {  // [B, 4 (K + 1), h, w]
  sparse_motion<Element, false>(thumbnail, source_value, source_jacobian, driving_value, driving_jacobian, stacked,
                                3LL * h * w, h * w, w, 1, K, h, w);
}
