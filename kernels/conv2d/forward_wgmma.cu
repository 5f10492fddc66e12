// Convolution on Hopper (sm_90a), of images with a multiple of 64 channels, 16 bits, sums in float.
//
// A block makes PIXELS pixels × CHANNELS channels, step by step: 64 channels of one tap, all taps of 64 channels before
// the next 64. One warpgroup fetches the steps into rings of shared memory: weights, a tile a step, and pixels. One or
// two warpgroups multiply them, both operands in shared memory.
//
// Without HALO the pixels of every step are gathered anew: any kernel size, stride and map will do.
//
// With HALO the pixels of a block are a patch, 8 wide and PIXELS / 8 tall. It is fetched once for all taps, with the
// border they reach, and a tap is the same patch read from a shifted place: 8 pixels of a line are the 8 rows of 128
// bytes that the tensor cores take at a time, and from line to line it is `stride` bytes. The swizzle goes by the
// address, not by the row of a matrix, so what was written by address is found from any start.
//
//   patch of a 3 × 3 kernel          tap (1, 2) of the first 8 pixels
//   0 1 2 3 4 5 6 7 8 9              . . . . . . . . . .
//   ...                              . . x x x x x x x x
//
// The weights then lie in device memory as shared memory wants them, [K / 64][rows][64] and swizzled, so that one thread
// fetches a step's by one bulk copy.
#include "conv2d.cuh"
#include "hopper.cuh"

constexpr int DEPTH = 64;  // channels of a step: rows of 128 bytes
constexpr int CONSUMERS = PIXELS == 64 ? 128 : 256;
constexpr int PRODUCERS = 128;
constexpr int PATCHERS = PRODUCERS - 32;  // those of them that fetch patches; the others fetch weights
constexpr int BLOCKS = PIXELS * 2 / CONSUMERS;  // of 64 pixels, of a warpgroup
static_assert(PIXELS == 64 || PIXELS == 128 || PIXELS == 256, "pixels of a block");
static_assert(CHANNELS == 64 || CHANNELS == 128 || CHANNELS == 256, "channels of a block");
static_assert(BLOCKS * CHANNELS <= 256, "sums must fit the registers");

// Shared memory, in bytes: images, weights, barriers, a flag. At the end the sums take the place of the first two.
constexpr int WIDTH = 8, HEIGHT = PIXELS / WIDTH;  // of a patch without its border
constexpr int MOST_BORDER = 2;
constexpr int WEIGHT_BYTES = CHANNELS * 128;
constexpr int PATCH_BYTES = (WIDTH + MOST_BORDER) * (HEIGHT + MOST_BORDER) * 128;
constexpr int IMAGE_BYTES = HALO ? (PATCH_BYTES + 1023) / 1024 * 1024 : PIXELS * 128;
constexpr int BUDGET = (RESIDENT == 2 ? 112 : 224) * 1024;  // of a block, RESIDENT of which a multiprocessor runs
constexpr int ROOM = HALO ? (BUDGET - 2 * IMAGE_BYTES) / WEIGHT_BYTES : BUDGET / (IMAGE_BYTES + WEIGHT_BYTES);
constexpr int STAGES = ROOM < 8 ? ROOM : 8;
constexpr int IMAGES = HALO ? 2 : STAGES;
constexpr int WEIGHTS = IMAGES * IMAGE_BYTES;
constexpr int BARRIERS = WEIGHTS + STAGES * WEIGHT_BYTES;
constexpr int FLAG = BARRIERS + 2 * (STAGES + IMAGES) * 8;
constexpr int SHARED_BYTES = FLAG + 8;
constexpr int PITCH = CHANNELS + 8;  // of the sums, floats: a warp's writes fall into different banks
static_assert(STAGES >= 3 && SHARED_BYTES <= BUDGET + 1024, "shared memory");
static_assert(PIXELS * PITCH * 4 <= BARRIERS, "the sums must fit");
// Gathered steps are announced when LAG more have been asked for, and given back when the next one has begun.
constexpr int LAG = STAGES / 2;
static_assert(LAG <= STAGES - 2 || HALO, "the ring would wait for itself");

// What a block makes, of which steps.
struct Place {
  int first_m;     // without HALO: rows follow each other
  int b, y, x;     // with HALO: the first pixel of the patch
  int first_n, phase, part;
  int tile;        // of all tiles of all phases
  int begin, end;  // steps
};
template <class T> __device__ __forceinline__ Place place_of(const Conv<T>& conv) {
  Place at;
  int columns = (conv.rows + CHANNELS - 1) / CHANNELS, row = blockIdx.x / columns;
  at.first_n = blockIdx.x % columns * CHANNELS;
  at.part = blockIdx.y % conv.split, at.phase = blockIdx.y / conv.split;
  at.tile = at.phase * gridDim.x + blockIdx.x;
  at.first_m = row * PIXELS;
  int wide = (conv.Wo + WIDTH - 1) / WIDTH, tall = (conv.Ho + HEIGHT - 1) / HEIGHT;
  at.x = row % wide * WIDTH, at.y = row / wide % tall * HEIGHT, at.b = row / wide / tall;
  int taps = conv.k * conv.k, whole = HALO ? taps : 1;  // a part takes patches as a whole
  int wholes = conv.Cin / DEPTH * taps / whole;
  at.begin = wholes * at.part / conv.split * whole, at.end = wholes * (at.part + 1) / conv.split * whole;
  return at;
}

struct Rings {
  unsigned char *images, *weights;
  Barrier *full, *empty;              // [STAGES], of the weights; without HALO of the pixels too
  Barrier *image_full, *image_empty;  // [IMAGES], with HALO
};

// A step as both sides count them.
struct Step {
  int ky, kx, channel, tap;
  int stage, turn;         // of the weights' ring: turn counts its rounds, 0 or 1
  int image, image_turn;   // of the patches' ring
  __device__ __forceinline__ Step(int begin, int k) {
    int taps = k * k;
    tap = begin % taps, channel = begin / taps * DEPTH, ky = tap / k, kx = tap % k;
    stage = turn = image = image_turn = 0;
  }
  __device__ __forceinline__ void next(int k) {
    if (++stage == STAGES) stage = 0, turn ^= 1;
    tap++;
    if (++kx < k) return;
    kx = 0;
    if (++ky < k) return;
    ky = 0, tap = 0, channel += DEPTH;
    if (HALO && ++image == IMAGES) image = 0, image_turn ^= 1;
  }
};

// Byte of a row of 128 where piece `piece` lies; rows count from a multiple of 1024 bytes.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// ---- fetching with HALO ----
template <class T> __device__ __forceinline__ void produce_weights(const Conv<T>& conv, const Place& at, Rings rings) {
  Step step(at.begin, conv.k);
#pragma unroll 1
  for (int i = at.begin; i < at.end; i++) {
    int slice = (at.phase * conv.k * conv.k + step.tap) * (conv.Cin / DEPTH) + step.channel / DEPTH;
    const T* from = conv.weight + ((long long)slice * conv.rows + at.first_n) * DEPTH;
    barrier_wait(&rings.empty[step.stage], step.turn ^ 1);
    barrier_expect(&rings.full[step.stage], WEIGHT_BYTES);
    bulk_copy<1>(rings.weights + step.stage * WEIGHT_BYTES, from, WEIGHT_BYTES, &rings.full[step.stage]);
    step.next(conv.k);
  }
}

// A thread fetches the same 16 bytes of the same pixels for every 64 channels: what they are is worked out once.
template <class T>
__device__ __forceinline__ void produce_patches(const Conv<T>& conv, const Place& at, Rings rings, int thread) {
  constexpr int EACH = PATCHERS / 8, MOST = (PATCH_BYTES / 128 + EACH - 1) / EACH;
  int piece = thread % 8, first = thread / 8, pitch = WIDTH - 1 + conv.k, pixels = (HEIGHT - 1 + conv.k) * pitch;
  int sources[MOST];
  auto fetch = [&](int j, int source, unsigned char* to, int channel) {
    if (first + j * EACH >= pixels) return;
    const T* from = conv.x + (long long)source * conv.x_pitch + channel;
    cp_async<16>(to + swizzled(first + j * EACH, piece), source < 0 ? conv.x : from, source >= 0);
  };
  auto announce = [&](int image) {
    cp_async_commit();
    cp_async_wait<0>();
    fence_shared_for_wgmma();
    barrier_arrive(&rings.image_full[image]);
  };
  int taps = conv.k * conv.k, channel = at.begin / taps * DEPTH + piece * 8, end = at.end / taps * DEPTH;
  Window window = {at.y - conv.padding + at.phase / 2, at.x - conv.padding + at.phase % 2, at.b * conv.H * conv.W};
  int line = first >= pitch, column = first - line * pitch;
  static_assert(EACH > WIDTH + MOST_BORDER && EACH < 2 * WIDTH, "a thread's next pixel is one or two lines below");
#pragma unroll
  for (int j = 0; j < MOST; j++) {
    sources[j] = source_of(conv, window, line, column);
    fetch(j, sources[j], rings.images, channel);
    column += EACH - pitch, line++;
    if (column >= pitch) column -= pitch, line++;
  }
  announce(0);
  int image = 1, turn = 0;
#pragma unroll 1
  for (channel += DEPTH; channel < end; channel += DEPTH) {
    unsigned char* to = rings.images + image * IMAGE_BYTES;
    barrier_wait(&rings.image_empty[image], turn ^ 1);
#pragma unroll
    for (int j = 0; j < MOST; j++) fetch(j, sources[j], to, channel);
    announce(image);
    if (++image == IMAGES) image = 0, turn ^= 1;
  }
}

// ---- fetching without ----
template <class T> __device__ __forceinline__ void produce_gathered(const Conv<T>& conv, const Place& at, Rings rings) {
  constexpr int EACH = PRODUCERS / 8;  // rows that the threads fetch at a time, 16 bytes each
  int piece = threadIdx.x % 8, first = threadIdx.x / 8, K = conv.K();
  Window windows[PIXELS / EACH];
#pragma unroll
  for (int i = 0; i < PIXELS / EACH; i++) windows[i] = window_of(conv, at.first_m + first + i * EACH, at.phase);
  const T* weight = conv.weight + (long long)(at.phase * conv.rows + at.first_n) * K + piece * 8;
  Step step(at.begin, conv.k);
  int announced = 0;
#pragma unroll 1
  for (int i = at.begin; i < at.end + LAG; i++) {
    if (i < at.end) {
      barrier_wait(&rings.empty[step.stage], step.turn ^ 1);
#pragma unroll
      for (int j = 0; j < PIXELS / EACH; j++) {
        int source = source_of(conv, windows[j], step.ky, step.kx);
        const T* from = conv.x + (long long)source * conv.x_pitch + step.channel + piece * 8;
        cp_async<16>(rings.images + step.stage * IMAGE_BYTES + swizzled(first + j * EACH, piece),
                     source < 0 ? conv.x : from, source >= 0);
      }
      const T* from = weight + step.tap * conv.Cin + step.channel;
#pragma unroll
      for (int j = 0; j < CHANNELS / EACH; j++) {
        int row = first + j * EACH;
        bool valid = at.first_n + row < conv.rows;
        cp_async<16>(rings.weights + step.stage * WEIGHT_BYTES + swizzled(row, piece),
                     valid ? from + (long long)row * K : conv.weight, valid);
      }
      step.next(conv.k);
    }
    cp_async_commit();
    if (i >= at.begin + LAG) {
      cp_async_wait<LAG>();
      fence_shared_for_wgmma();
      barrier_arrive(&rings.full[announced]);
      announced = announced + 1 == STAGES ? 0 : announced + 1;
    }
  }
}

// ---- multiplying ----
// Eight sums of a pixel, plus what is given.
__device__ __forceinline__ void read_8(const float* from, const float (&plus)[8], float (&v)[8]) {
  float4 low = ((const float4*)from)[0], high = ((const float4*)from)[1];
  v[0] = low.x + plus[0], v[1] = low.y + plus[1], v[2] = low.z + plus[2], v[3] = low.w + plus[3];
  v[4] = high.x + plus[4], v[5] = high.y + plus[5], v[6] = high.z + plus[6], v[7] = high.w + plus[7];
}
__device__ __forceinline__ void activate_8(float (&v)[8], int activation) {
  if (activation == RELU) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = activated(v[i], RELU);
  } else if (activation) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = activated(v[i], activation);
  }
}
template <class T> __device__ __forceinline__ uint4 pack_8(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// The patch as write_tile does it for rows that follow each other, whatever is asked for.
template <class T>
__device__ __forceinline__ void write_slowly(const Conv<T>& conv, const float* sums, const Place& at, int thread) {
  constexpr int PIECES = CHANNELS / 8;
  int shrunk = conv.flags & POOL ? 2 : 1, twice = conv.flags & (REPEAT | UPSAMPLE) ? 2 : 1;
  int width = conv.Wo * twice / shrunk, height = conv.Ho * twice / shrunk;  // of the result
#pragma unroll 1
  for (int i = thread; i < PIXELS / shrunk / shrunk * PIECES; i += CONSUMERS) {
    int pixel = i / PIECES, n = at.first_n + i % PIECES * 8, count = conv.Cout - n;
    int y = pixel / (WIDTH / shrunk) * shrunk, x = pixel % (WIDTH / shrunk) * shrunk;
    if (at.y + y >= conv.Ho || at.x + x >= conv.Wo || count <= 0) continue;
    const float* from = sums + (y * WIDTH + x) * PITCH + i % PIECES * 8;
    y = (at.y + y) * twice / shrunk, x = (at.x + x) * twice / shrunk;
    if (conv.flags & UPSAMPLE) y += at.phase / 2, x += at.phase % 2;
    long long to = ((long long)at.b * height + y) * width + x;
    float v[8], sum[8] = {};
#pragma unroll 1
    for (int part = 0; part < shrunk * shrunk; part++) {
      const float none[8] = {};
      read_8(from + (part / 2 * WIDTH + part % 2) * PITCH, none, v);
      finish_8(conv, v, to, n, count);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += shrunk == 2 ? 0.25f * v[j] : v[j];
    }
#pragma unroll 1
    for (int copy = 0; copy < (conv.flags & REPEAT ? 4 : 1); copy++) {
      write_8(conv, sum, to + copy / 2 * width + copy % 2, n, count);
    }
  }
}

// The same for what the networks ask for most: 16 bits, eight channels at a time. A thread keeps to eight channels, and
// asks for the residuals of several pixels before it uses the first.
template <class T>
__device__ __forceinline__ void write_patch(const Conv<T>& conv, const float* sums, const Place& at, int thread) {
  constexpr int PIECES = CHANNELS / 8, AT_ONCE = CONSUMERS / PIECES, TIMES = PIXELS / AT_ONCE;
  constexpr int GROUP = RESIDENT == 2 ? 2 : 4;  // as registers allow
  static_assert(TIMES % GROUP == 0, "groups of pixels");
  if (!(conv.flags & VECTORS) || conv.flags & (REPEAT | FLOAT_OUT | BYTE_OUT) || conv.Cout < conv.rows) {
    return write_slowly(conv, sums, at, thread);
  }
  int n = at.first_n + thread % PIECES * 8, first = thread / PIECES, activation = conv.flags & ACTIVATION;
  T *out = (T*)conv.out + n, *second = (T*)conv.second + n;
  sums += thread % PIECES * 8;
  float bias[8], scale[8], shift[8], v[8];
  const float none[8] = {};
  read_8(conv.bias + n, none, bias);
  if (conv.second) {
#pragma unroll
    for (int i = 0; i < 8; i++) scale[i] = conv.scale[n + i], shift[i] = conv.shift[n + i];
  }
  auto write = [&](long long to) {
    *(uint4*)(out + to * conv.out_pitch) = pack_8<T>(v);
    if (conv.second) {
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = activated(fmaf(v[i], scale[i], shift[i]), RELU);
      *(uint4*)(second + to * conv.second_pitch) = pack_8<T>(v);
    }
  };

  if (conv.flags & POOL) {
#pragma unroll 1
    for (int quad = first; quad < PIXELS / 4; quad += AT_ONCE) {
      int y = quad / (WIDTH / 2) * 2, x = quad % (WIDTH / 2) * 2;
      if (at.y + y >= conv.Ho || at.x + x >= conv.Wo) continue;
      float mean[8] = {};
#pragma unroll 1
      for (int part = 0; part < 4; part++) {
        read_8(sums + ((y + part / 2) * WIDTH + x + part % 2) * PITCH, bias, v);
        activate_8(v, activation);
#pragma unroll
        for (int i = 0; i < 8; i++) mean[i] += 0.25f * v[i];
      }
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = mean[i];
      write(((long long)at.b * (conv.Ho / 2) + (at.y + y) / 2) * (conv.Wo / 2) + (at.x + x) / 2);
    }
    return;
  }
  // A thread's pixels lie below each other, AT_ONCE / WIDTH lines apart.
  static_assert(AT_ONCE % WIDTH == 0, "lines");
  int y = at.y + first / WIDTH, x = at.x + first % WIDTH, twice = conv.flags & UPSAMPLE ? 2 : 1;
  if (x >= conv.Wo) return;
  long long to = ((long long)at.b * conv.Ho + y) * twice * (conv.Wo * twice) + x * twice;
  if (twice == 2) to += at.phase / 2 * (conv.Wo * 2) + at.phase % 2;
  int down = AT_ONCE / WIDTH * twice * (conv.Wo * twice);
#pragma unroll 1
  for (int start = first; start < PIXELS; start += GROUP * AT_ONCE, y += GROUP * (AT_ONCE / WIDTH), to += GROUP * down) {
    uint4 residual[GROUP];
    if (conv.residual) {
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        bool valid = y + i * (AT_ONCE / WIDTH) < conv.Ho;
        residual[i] = load_16(conv.residual + (valid ? (to + i * down) * conv.residual_pitch + n : 0), valid);
      }
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      if (y + i * (AT_ONCE / WIDTH) >= conv.Ho) return;
      read_8(sums + (start + i * AT_ONCE) * PITCH, bias, v);
      if (conv.residual) {
        unsigned words[4] = {residual[i].x, residual[i].y, residual[i].z, residual[i].w};
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += j % 2 ? high_half<T>(words[j / 2]) : low_half<T>(words[j / 2]);
      }
      activate_8(v, activation);
      write(to + i * down);
    }
  }
}

// All steps of a warpgroup's pixels. A step is given back when the tensor cores have begun with the next.
template <class T>
__device__ __forceinline__ void multiply(const Conv<T>& conv, const Place& at, Rings rings, int group,
                                         float (&sums)[BLOCKS][CHANNELS / 2]) {
  bool speaker = threadIdx.x % 32 == 0;  // of its warp
  int k = HALO ? conv.k : 1;             // steps from one image to the next: k rows of k
  int pitch = HALO ? WIDTH - 1 + k : WIDTH;  // pixels from a line of 8 to the next
  unsigned long long lines = matrix_descriptor<128>(shared_address(rings.images) + group * BLOCKS * 8 * pitch * 128, 16,
                                                    pitch * 128);
  unsigned long long weights = matrix_descriptor<128>(shared_address(rings.weights), 16, 1024);
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) sums[block][i] = 0.f;
  }
  // Descriptors count in 16 bytes.
  int stage = 0, turn = 0, image = 0, image_turn = 0, before = -1, image_before = -1;
#pragma unroll 1
  for (int i = at.begin; i < at.end; i += k * k) {
    if (HALO) barrier_wait(&rings.image_full[image], image_turn);
    unsigned long long a = lines + image * (IMAGE_BYTES / 16);
#pragma unroll 1
    for (int ky = 0; ky < k; ky++, a += (pitch - k) * 8) {
#pragma unroll 1
      for (int kx = 0; kx < k; kx++, a += 8) {
        unsigned long long b = weights + stage * (WEIGHT_BYTES / 16);
        barrier_wait(&rings.full[stage], turn);
        wgmma_fence();
#pragma unroll
        for (int depth = 0; depth < DEPTH * 2; depth += 32) {
#pragma unroll
          for (int block = 0; block < BLOCKS; block++) {
            wgmma_shared<T>(sums[block], a + block * pitch * 64 + depth / 16, b + depth / 16);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before is through
        if (speaker && before >= 0) barrier_arrive(&rings.empty[before]);
        if (HALO && speaker && image_before >= 0) barrier_arrive(&rings.image_empty[image_before]);
        before = stage, image_before = -1;
        if (++stage == STAGES) stage = 0, turn ^= 1;
      }
    }
    image_before = image;
    if (++image == IMAGES) image = 0, image_turn ^= 1;
  }
  wgmma_wait<0>();
}

template <class T>
__device__ __forceinline__ void consume(const Conv<T>& conv, const Place& at, Rings rings, unsigned char* shared) {
  int thread = threadIdx.x - PRODUCERS, lane = thread % 32, group = thread / 128;
  float sums[BLOCKS][CHANNELS / 2];
  multiply(conv, at, rings, group, sums);

  auto sync = [] { named_barrier(1, CONSUMERS); };
  constexpr int GROUPS = BLOCKS * CHANNELS / 8;
  float* parts = conv.partials + (long long)at.tile * conv.split * GROUPS * CONSUMERS * 4;
  if (!join_parts<CONSUMERS, GROUPS>((float(&)[GROUPS][4])sums, parts, conv.counters + at.tile, at.part, conv.split,
                                     thread, (int*)(shared + FLAG), sync)) {
    return;
  }
  sync();  // all are through with the rings
  float* staged = (float*)shared;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i += 2) {
      int row = (group * BLOCKS + block) * 64 + thread % 128 / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
      *(float2*)(staged + row * PITCH + i / 4 * 8 + lane % 4 * 2) = make_float2(sums[block][i], sums[block][i + 1]);
    }
  }
  sync();
  if constexpr (HALO) {
    write_patch(conv, staged, at, thread);
  } else {
    write_tile<PIXELS, CHANNELS, PITCH, CONSUMERS>(conv, staged, at.first_m, at.first_n, at.phase, thread);
  }
}

template <class T> __device__ __forceinline__ void convolve(const Conv<T>& conv) {
  unsigned char* shared = dynamic_shared();
  Barrier* barriers = (Barrier*)(shared + BARRIERS);
  Barrier* of_images = barriers + 2 * STAGES;
  Rings rings = {shared, shared + WEIGHTS, barriers, barriers + STAGES, of_images, of_images + IMAGES};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(&rings.full[stage], HALO ? 1 : PRODUCERS);
      barrier_init(&rings.empty[stage], CONSUMERS / 32);
    }
    for (int image = 0; image < IMAGES; image++) {
      barrier_init(&rings.image_full[image], PATCHERS);
      barrier_init(&rings.image_empty[image], CONSUMERS / 32);
    }
    barriers_ready();
  }
  Place at = place_of(conv);
  __syncthreads();
  if (threadIdx.x < PRODUCERS) {
    if constexpr (!HALO) {
      produce_gathered(conv, at, rings);
    } else if (threadIdx.x >= PRODUCERS - PATCHERS) {
      produce_patches(conv, at, rings, threadIdx.x - (PRODUCERS - PATCHERS));
    } else if (threadIdx.x == 0) {
      produce_weights(conv, at, rings);
    }
  } else {
    consume(conv, at, rings, shared);
  }
}

// Grid (tiles of channels × tiles of pixels, those of channels next to each other; phases × split, parts next to each
// other; 1), PRODUCERS + CONSUMERS threads, SHARED_BYTES of dynamic shared memory. Cin is a multiple of 64; with HALO
// k is 2 or 3, the stride 1 and rows a multiple of CHANNELS. x and weight are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(PRODUCERS + CONSUMERS, RESIDENT) conv2d_wgmma_f16(CONV_PARAMETERS(f16)) {
  convolve(Conv<f16>{CONV_ARGUMENTS});
}
extern "C" __global__ void __launch_bounds__(PRODUCERS + CONSUMERS, RESIDENT) conv2d_wgmma_bf16(CONV_PARAMETERS(bf16)) {
  convolve(Conv<bf16>{CONV_ARGUMENTS});
}
