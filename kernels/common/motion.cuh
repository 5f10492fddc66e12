// First-order motion around key points, T(z) = J_s J_d⁻¹ (z - d) + s, as sparse_motion and dense_flow share it.
#pragma once

constexpr int MOST_MOTIONS = 64;  // K + 1: motion 0 is the background's, which stays where it is

// The key points of one face, as they came.
struct KeyPoints {
  float source_value[2 * MOST_MOTIONS], source_jacobian[4 * MOST_MOTIONS];
  float driving_value[2 * MOST_MOTIONS], driving_jacobian[4 * MOST_MOTIONS];
};

// By all threads of a block, so that one wait fetches everything; a barrier must follow.
__device__ __forceinline__ void load_key_points(KeyPoints& points, int thread, int threads, int K,
                                                const float* __restrict__ source_value,       // [K, 2]
                                                const float* __restrict__ source_jacobian,    // [K, 2, 2]
                                                const float* __restrict__ driving_value,      // [K, 2]
                                                const float* __restrict__ driving_jacobian) {  // [K, 2, 2]
#pragma unroll 1  // code is to be fetched too, and a thread seldom has more than one turn
  for (int i = thread; i < 4 * K; i += threads) {
    points.source_jacobian[i] = source_jacobian[i];
    points.driving_jacobian[i] = driving_jacobian[i];
    if (i < 2 * K) {
      points.source_value[i] = source_value[i];
      points.driving_value[i] = driving_value[i];
    }
  }
}

// One column a motion, so that threads of consecutive motions read consecutive words.
struct Motions {
  float frame[4][MOST_MOTIONS];  // J_s J_d⁻¹, row by row
  float driving[2][MOST_MOTIONS], source[2][MOST_MOTIONS];
};

// Entry i of the frame of motion k, and with it coordinate i of its points: one of 4 (K + 1) shares of the work.
__device__ __forceinline__ void compute_motion(Motions& motions, int k, int i, const KeyPoints& points) {
  float frame = i == 0 || i == 3 ? 1.f : 0.f, driving = 0.f, source = 0.f;
  if (k > 0) {
    const float *s = points.source_jacobian + 4 * (k - 1) + (i & 2), *d = points.driving_jacobian + 4 * (k - 1);
    // Both products are rounded: the determinant of a singular matrix then is exactly zero, as the reference's is.
    float determinant = __fmul_rn(d[0], d[3]) - __fmul_rn(d[1], d[2]);
    // A row of J_s times a column of the adjugate of J_d.
    frame = (i & 1 ? fmaf(s[1], d[0], -s[0] * d[1]) : fmaf(s[0], d[3], -s[1] * d[2])) / determinant;
    driving = points.driving_value[2 * (k - 1) + (i & 1)];
    source = points.source_value[2 * (k - 1) + (i & 1)];
  }
  motions.frame[i][k] = frame;
  if (i < 2) {
    motions.driving[i][k] = driving;
    motions.source[i][k] = source;
  }
}

// Where motion k takes (x, y).
__device__ __forceinline__ float2 move(const Motions& motions, int k, float x, float y) {
  x -= motions.driving[0][k];
  y -= motions.driving[1][k];
  return make_float2(fmaf(motions.frame[0][k], x, motions.frame[1][k] * y) + motions.source[0][k],
                     fmaf(motions.frame[2][k], x, motions.frame[3][k] * y) + motions.source[1][k]);
}

// Coordinate of a pixel on the corner-aligned grid, [-1, 1]; NaN (0 / 0) along a side of one pixel.
__device__ __forceinline__ float coordinate(int pixel, int size) {
  return 2.f * (float)pixel / (float)(size - 1) - 1.f;
}
