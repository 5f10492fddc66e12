// Rows of up to eight arrays, chosen by slots that lie on the device, in one launch: out[i][b] = pool[i][slots[b]].
//
// A row is cut into chunks of CHUNK bytes, and those of all arrays are numbered one after the other: blockIdx.x.
#include "types.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 4;                    // vectors of a thread, all read before the first is written
constexpr int CHUNK = 16 * EACH * THREADS;  // bytes

template <class V> __device__ __forceinline__ void copy(char* to, const char* from, int bytes) {
  int count = bytes / sizeof(V);
  for (int first = threadIdx.x; first < count; first += EACH * THREADS) {
    V value[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) value[i] = ((const V*)from)[min(first + i * THREADS, count - 1)];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (first + i * THREADS < count) ((V*)to)[first + i * THREADS] = value[i];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const int* slots,  // [B]
           const char* pool0, const char* pool1, const char* pool2, const char* pool3, const char* pool4,
           const char* pool5, const char* pool6, const char* pool7,  // [rows, bytes each]; null where there is none
           char* out0, char* out1, char* out2, char* out3, char* out4, char* out5, char* out6, char* out7,
           long long bytes0, long long bytes1, long long bytes2, long long bytes3, long long bytes4, long long bytes5,
           long long bytes6, long long bytes7,  // of a row, multiples of 4; 0 where there is none
           int rows) {
  wait_for_earlier();
  start_later();
  long long b = blockIdx.y, slot = slots[b];
  if (slot < 0 || slot >= rows) slot = rows - 1;  // nothing outside is read
  const char* pools[8] = {pool0, pool1, pool2, pool3, pool4, pool5, pool6, pool7};
  char* outs[8] = {out0, out1, out2, out3, out4, out5, out6, out7};
  long long bytes[8] = {bytes0, bytes1, bytes2, bytes3, bytes4, bytes5, bytes6, bytes7};

  // Selected without an index that varies, which would put the arrays into memory.
  const char* from = nullptr;
  char* to = nullptr;
  long long size = 0, at = 0, chunk = blockIdx.x;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    long long chunks = (bytes[i] + CHUNK - 1) / CHUNK;
    if (chunk >= 0 && chunk < chunks) from = pools[i], to = outs[i], size = bytes[i], at = chunk * CHUNK;
    chunk -= chunks;
  }
  from += slot * size + at;
  to += b * size + at;
  int count = (int)min(size - at, (long long)CHUNK);
  if ((((unsigned long long)from | (unsigned long long)to | size) & 15) == 0) {
    copy<uint4>(to, from, count);
  } else {
    copy<unsigned>(to, from, count);
  }
}
