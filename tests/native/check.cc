// The library's C functions against plain double arithmetic, without Python: for sanitizers and emulators.
// Exits with the number of failed checks. run.sh builds and runs it.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "api.h"

extern "C" {
int blockscale_use(const char* isa);
void blockscale_linear(const LinearSpec*, const LinearCall*);
void blockscale_quantize(const QuantizeRule*, int64_t, int64_t, const void*, int32_t, const float*, uint8_t*, void*,
                         int32_t);
void blockscale_dense(int64_t, int64_t, int64_t, const void*, const void*, const void*, void*, int32_t, int32_t, int32_t,
                      int32_t);
}

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }
static float uniform() { return (float)(next() >> 8) / (1 << 23) - 1; }

static double value(int element, const uint8_t* row, int64_t i) {  // an element, straight from its definition
  const int mantissa = element == kElementE4M3 ? 3 : element == kElementE5M2 ? 2 : 1;
  const int bias = element == kElementE4M3 ? 7 : element == kElementE5M2 ? 15 : 1;
  const int sign = element == kElementE2M1 ? 8 : 128;
  const int code = element == kElementE2M1 ? row[i / 2] >> (i % 2 * 4) & 15 : row[i];
  const int body = code & (sign - 1), exponent = body >> mantissa, low = body & ((1 << mantissa) - 1);
  double v = exponent ? ldexp(1 + ldexp(low, -mantissa), exponent - bias) : ldexp(low, 1 - bias - mantissa);
  if (element == kElementE4M3 && body == 0x7F) v = NAN;
  if (element == kElementE5M2 && exponent == 31) v = low ? NAN : INFINITY;
  return code & sign ? -v : v;
}

static int failures = 0;
static void expect(bool ok, const char* isa, const char* what, double got, double want) {
  if (ok) return;
  if (failures++ < 20) printf("FAILED %s %s: got %.9g, want %.9g\n", isa, what, got, want);
}

// Heap blocks of the exact size, so that a sanitizer sees a read past the end.
template <class T>
static T* array(int64_t count) {
  return (T*)malloc(count * sizeof(T) ? count * sizeof(T) : 1);
}

// How many roundings a product can go through on its way into y: the bound of its error is that many times 2^-24 of
// the sum of all magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), whatever the order.
static double roundings(const char* isa, int64_t k) {
  const int64_t lanes = !strncmp(isa, "avx512", 6) ? 16 : !strcmp(isa, "avx2") ? 8 : 4;
  const int64_t in_a_lane = ((k < 1024 ? k : 1024) + lanes - 1) / lanes;  // a panel of gemm.h; gemv.h adds up fewer
  const int64_t panels_and_groups = k / 128 + 2;
  const int64_t across_lanes = 4;                 // log2 of the most lanes
  const int64_t scales_and_bias = 5;              // two scales, their product, the bias, and `dense` below itself
  return (double)(in_a_lane + panels_and_groups + across_lanes + scales_and_bias);
}

struct Shape { int64_t m, n, k, block_rows, block_cols; };

// x_type: float, or bf16, which takes another way on some processors. nan: the last byte of the weight is NaN.
static void check_linear(const char* isa, int element, int engine, int x_type, Shape shape, bool nan) {
  const int64_t m = shape.m, n = shape.n, k = shape.k, br = shape.block_rows, bc = shape.block_cols;
  const int64_t bytes = element == kElementE2M1 ? k / 2 : k;
  const int64_t rows = br ? br : n, cols = bc ? bc : k, gr = (n + rows - 1) / rows, gc = (k + cols - 1) / cols;
  uint8_t* w = array<uint8_t>(n * bytes);
  float *scale = array<float>(gr * gc), *x = array<float>(m * k), *bias = array<float>(n), *y = array<float>(m * n);
  uint16_t* half = array<uint16_t>(m * k);
  for (int64_t i = 0; i < n * bytes; i++) {
    w[i] = (uint8_t)(next() >> 24);
    if (element != kElementE2M1 && (w[i] & 0x7F) >= (element == kElementE4M3 ? 0x7F : 0x7C)) w[i] &= 0x3F;
  }
  if (nan) w[bytes - 1] = 0xFF;
  for (int64_t i = 0; i < gr * gc; i++) scale[i] = 0.01f + fabsf(uniform());
  for (int64_t i = 0; i < m * k; i++) {
    x[i] = uniform();
    uint32_t u;
    memcpy(&u, &x[i], 4);
    half[i] = (uint16_t)(u >> 16);
    if (x_type == kBFloat16) u &= 0xFFFF0000, memcpy(&x[i], &u, 4);
  }
  for (int64_t i = 0; i < n; i++) bias[i] = uniform();
  for (int64_t i = 0; i < m * n; i++) y[i] = NAN;
  const LinearSpec spec = {n, k, br, bc, element, x_type, kFloat32, engine, {}};
  const void* given = x_type == kBFloat16 ? (const void*)half : x;
  const LinearCall call = {m, given, w, scale, nullptr, bias, nullptr, y, kFloat32, kFloat32};
  blockscale_linear(&spec, &call);
  for (int64_t a = 0; a < m; a++)
    for (int64_t r = 0; r < n; r++) {
      double want = bias[r], terms = fabs(bias[r]), steps = 0;
      for (int64_t g = 0; g < k; g += 128) {
        double largest = 0, weights = 0;  // of a group that int16 shares a step of x for
        for (int64_t i = g; i < g + 128 && i < k; i++) {
          const float s = scale[r / rows * gc + i / cols], dense = (float)(value(element, w + r * bytes, i) * s);
          want += (double)dense * x[a * k + i];
          terms += fabs((double)dense * x[a * k + i]);
          largest = fmax(largest, fabs(x[a * k + i])), weights += fabs(dense) + s / 64;
          steps += fabs(x[a * k + i]) * s / 64;  // half a step of a weight is 1/64
        }
        steps += largest / 16382 * weights;  // half a step of x
      }
      const double got = y[a * n + r], bound = roundings(isa, k) * 0x1p-24 * terms + (engine == kInt16 ? steps : 0);
      if (isnan(want)) expect(isnan(got), isa, "NaN weight", got, want);
      else expect(fabs(got - want) <= bound, isa, engine == kInt16 ? "int16" : "linear", got, want);
    }
  free(w), free(scale), free(x), free(half), free(bias), free(y);
}

static void check_quantize(const char* isa, int64_t rows, int64_t cols, int64_t br, int64_t bc) {
  const int64_t h = br ? br : rows, v = bc ? bc : cols, gr = (rows + h - 1) / h, gc = (cols + v - 1) / v;
  float *x = array<float>(rows * cols), *scale = array<float>(gr * gc);
  uint8_t* data = array<uint8_t>(rows * cols);
  for (int64_t i = 0; i < rows * cols; i++) x[i] = uniform() * expf(8 * uniform());
  QuantizeRule rule = {br, bc, kElementE4M3, kRoundNone, 1e-10f, 1};
  blockscale_quantize(&rule, rows, cols, x, kFloat32, nullptr, data, scale, kFloat32);
  for (int64_t g = 0; g < gr; g++)
    for (int64_t c = 0; c < gc; c++) {
      float amax = 1e-10f;
      for (int64_t i = g * h; i < (g + 1) * h && i < rows; i++)
        for (int64_t j = c * v; j < (c + 1) * v && j < cols; j++) amax = fmaxf(amax, fabsf(x[i * cols + j]));
      expect(scale[g * gc + c] == amax / 448, isa, "scale", scale[g * gc + c], amax / 448);
      for (int64_t i = g * h; i < (g + 1) * h && i < rows; i++)
        for (int64_t j = c * v; j < (c + 1) * v && j < cols; j++) {
          const float want = x[i * cols + j] / (amax / 448);  // the code must be a nearest one, the even one at a tie
          const uint8_t code = data[i * cols + j];
          const double here = fabs(value(kElementE4M3, &code, 0) - want);
          for (int d = -1; d <= 1; d += 2) {
            const uint8_t other = (uint8_t)(code + d);
            if ((other & 0x7F) == 0x7F || (other ^ code) & 0x80) continue;
            const double there = fabs(value(kElementE4M3, &other, 0) - want);
            expect(here < there || (here == there && code % 2 == 0), isa, "code", here, there);
          }
        }
    }
  free(x), free(scale), free(data);
}

static void check_dense(const char* isa, int64_t m, int64_t n, int64_t k) {
  float *x = array<float>(m * k), *y = array<float>(m * n);
  uint16_t* w = array<uint16_t>(n * k);  // bf16
  for (int64_t i = 0; i < m * k; i++) x[i] = uniform();
  for (int64_t i = 0; i < n * k; i++) {
    const float f = uniform();
    uint32_t u;
    memcpy(&u, &f, 4);
    w[i] = (uint16_t)(u >> 16);
  }
  blockscale_dense(m, n, k, x, w, nullptr, y, kFloat32, kBFloat16, kFloat32, kFloat32);
  for (int64_t a = 0; a < m; a++)
    for (int64_t r = 0; r < n; r++) {
      double want = 0;
      for (int64_t i = 0; i < k; i++) {
        const uint32_t u = (uint32_t)w[r * k + i] << 16;
        float f;
        memcpy(&f, &u, 4);
        want += (double)f * x[a * k + i];
      }
      expect(fabs(y[a * n + r] - want) < 1e-4, isa, "dense", y[a * n + r], want);
    }
  free(x), free(w), free(y);
}

int main() {
  for (const char* isa : {"avx512bf16", "avx512", "avx2", "sse2", "neon", "generic"}) {
    if (blockscale_use(isa) != 0) continue;
    for (int element : {kElementE4M3, kElementE5M2, kElementE2M1})
      for (int x_type : {kFloat32, kBFloat16})
        for (int64_t m : {1, 2, 3, 4, 5, 9, 70})
          for (int64_t k : {2, 64, 190, 1100}) {
            check_linear(isa, element, kExact, x_type, {m, 37, k, 32, 32}, false);
            check_linear(isa, element, kExact, x_type, {m, 37, k, 1, 16}, false);
            check_linear(isa, element, kExact, x_type, {m, 37, k, 128, 128}, element != kElementE2M1);
            check_linear(isa, element, kExact, x_type, {m, 5, k, 0, 0}, false);
          }
    if (!strncmp(isa, "avx", 3))
      for (int64_t m : {1, 5, 9, 70})
        for (int64_t k : {2, 190, 1100}) {
          check_linear(isa, kElementE4M3, kInt16, kFloat32, {m, 37, k, 128, 128}, true);
          check_linear(isa, kElementE4M3, kInt16, kBFloat16, {m, 6, k, 1, 128}, false);
          check_linear(isa, kElementE4M3, kInt16, kFloat32, {m, 5, k, 0, 0}, false);
        }
    for (int64_t cols : {1, 31, 128, 300})
      for (int64_t block : {0, 32, 128}) {
        check_quantize(isa, 70, cols, 1, block);
        check_quantize(isa, 70, cols, block, block);
      }
    for (int64_t m : {1, 2, 3, 4}) check_dense(isa, m, 67, 333);
    printf("%s: done, %d failed\n", isa, failures);
  }
  return failures > 0;
}
