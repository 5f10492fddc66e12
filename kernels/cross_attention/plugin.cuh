// The kernel as TensorRT calls it: the input tensors, their sizes, the output tensor; all contiguous. It has no memory
// besides, so that each query tile is one block a chunk of channels; small chunks make up for it.
// Grid: (B · N / QUERIES, C / CHANNELS), THREADS threads, dynamic shared memory as in the kernel.
#include "plugin_element.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    PLUGIN_NAME(cross_attention)(const Element* query,     // [B, D, N]
                                 const Element* key,       // [B, D, M]
                                 const Element* value,     // [B, C, M]
                                 const Element* residual,  // [B, C, N]
                                 const float* gamma,       // [1]
                                 int D, int C, int N, int M,
                                 Element* out) {  // [B, C, N]
  int chunks = (C + CHANNELS - 1) / CHANNELS, tiles = (M + KEYS - 1) / KEYS;
#ifdef TENSOR_CORES
  attend<Element, false>(query, key, value, residual, gamma, out, nullptr, nullptr, nullptr, nullptr, D, C, N, M, chunks,
                         tiles, N % 8 == 0 && M % 8 == 0);
#else
  attend<Element, false>(query, key, value, residual, gamma, out, nullptr, nullptr, nullptr, nullptr, D, C, N, M, chunks,
                         tiles);
#endif
}
