// 3 × 3 maximum with stride 2 and padding 1, channels-last: a thread makes 16 bytes of one pixel of the result.
#include "maximum.cuh"

constexpr int THREADS = 256;

template <class T> __device__ __forceinline__ uint4 larger(uint4 a, uint4 b) {
  return make_uint4(maximum_each<T>(a.x, b.x), maximum_each<T>(a.y, b.y), maximum_each<T>(a.z, b.z),
                    maximum_each<T>(a.w, b.w));
}

// Coordinates outside are clamped: the border pixel they become is in the window already, so that padding needs neither
// a branch nor a value of its own.
template <class T>
__device__ __forceinline__ void max_pool(const T* x,  // [B, H, W, C of x_stride]
                                         T* out,      // [B, h, w, C of out_stride]
                                         long long x_stride, long long out_stride, int H, int W, int h, int w,
                                         int vectors) {  // of a pixel
  wait_for_earlier();
  start_later();
  constexpr int VALUES = 16 / sizeof(T);
  int column = blockIdx.x * blockDim.y + threadIdx.y, row = blockIdx.y;
  if (column >= w) return;
  long long b = blockIdx.z;
  x += b * H * W * x_stride;
  out += ((b * h + row) * w + column) * out_stride;
  int places[9];  // of the window's pixels in the image
#pragma unroll
  for (int i = 0; i < 9; i++) {
    int from_row = min(max(2 * row - 1 + i / 3, 0), H - 1), from_column = min(max(2 * column - 1 + i % 3, 0), W - 1);
    places[i] = from_row * W + from_column;
  }
#pragma unroll 1
  for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
    uint4 found[9];
#pragma unroll
    for (int i = 0; i < 9; i++) found[i] = *(const uint4*)(x + places[i] * x_stride + vector * VALUES);
    // First with last: the compiler else makes later loads wait for the first comparisons.
#pragma unroll
    for (int i = 0; i < 3; i++) found[i] = larger<T>(larger<T>(found[i], found[6 + i]), found[3 + i]);
    uint4 most = larger<T>(larger<T>(found[0], found[2]), found[1]);
    __stcg((uint4*)(out + vector * VALUES), most);
  }
}

#define MAX_POOL(T, NAME)  \
  extern "C" __global__ void __launch_bounds__(THREADS) max_pool_##NAME(  \
      const T* x, T* out, long long x_stride, long long out_stride, int H, int W, int h, int w, int vectors) {  \
    max_pool<T>(x, out, x_stride, out_stride, H, W, h, w, vectors);  \
  }

MAX_POOL(float, f32)
MAX_POOL(f16, f16)
MAX_POOL(bf16, bf16)
