// x as the multiplication wants it: fp32, quantized and read back where the numerics say so, zero-padded to whole
// chunks, and permuted like decode.h delivers the weights.
#pragma once
#include "decode.h"
#include "quantize.h"

namespace BLOCKSCALE_ISA {

struct Prepared {
  float* x;          // [m, stride]
  int64_t stride;    // elements; odd in cache lines, so that rows do not fall on the same cache sets
  float* factor;     // [m], what results of a row must be multiplied by; only when normalised
};

constexpr int kHeadroom = 60;  // a normalised row's largest magnitude lies in 2^60 ... 2^61

template <class C>
static void fake_quantize(float* row, int64_t k, int64_t group, const QuantizeRule& rule, const float* given) {
  for (int64_t c = 0; c < k; c += group) {
    const int64_t count = round_up(least(group, k - c), W);  // zeros follow the row
    float part[W];  // what lies behind a group that is no multiple of W
    const int64_t tail = c + least(group, k - c);
    if (count > tail - c) {
      memcpy(part, row + tail, sizeof part);
      memset(row + tail, 0, (count - (tail - c)) * 4);
    }
    const F s = splat(given ? *given : make_scale<C>(maximum(bits<F>(amax_bits(row + c, count, I{}))), rule));
    for (int64_t i = c; i < c + count; i += W) store(row + i, round_trip<C>(load<F>(row + i) / s) * s);
    if (count > tail - c) memcpy(row + tail, part, (count - (tail - c)) * 4);
  }
}

// Multiply by a power of two so that products with scaled-down weights stay clear of fp32's subnormals.
INLINE float normalise(float* row, int64_t count) {
  int32_t exponent = bits<int32_t>(maximum(bits<F>(amax_bits(row, count, I{})))) >> 23;
  int up = kHeadroom + 127 - (exponent ? exponent : 127);
  const F half = splat(ldexpf(1, up / 2)), rest = splat(ldexpf(1, up - up / 2));
  for (int64_t i = 0; i < count; i += W) store(row + i, load<F>(row + i) * half * rest);
  return ldexpf(1, kHeadroom - up);
}

template <class D>
static void prepare_row(const LinearSpec& spec, const LinearCall& call, int64_t m, bool normalised, const float* given,
                        float* row, const Prepared& out) {
  const int64_t k = spec.k, padded = round_up(k, kChunk<D>);
  read_floats(call.x, spec.x_type, m * k, k, row);
  memset(row + k, 0, (padded + W - k) * 4);
  if (spec.activation.enabled) {
    const int64_t group = spec.activation.group ? spec.activation.group : k;
    if (spec.activation.element == kElementE5M2) fake_quantize<CodeE5M2>(row, k, group, spec.activation, given);
    else fake_quantize<CodeE4M3>(row, k, group, spec.activation, given);
  }
  if (normalised) out.factor[m] = normalise(row, padded);
  float* to = out.x + m * out.stride;
  for (int64_t c = 0; c < padded; c += kChunk<D>)
    UNROLL for (int j = 0; j < D::E; j++)
      for (int i = 0; i < W; i++) to[c + j * W + i] = row[c + D::E * i + j];
}

// The scale of "tensor" activations, over all of x.
static float tensor_scale(const LinearSpec& spec, const LinearCall& call, float* row) {
  I m = I{};
  for (int64_t r = 0; r < call.m; r++) {
    read_floats(call.x, spec.x_type, r * spec.k, spec.k, row);
    m = amax_bits(row, spec.k, m);
  }
  float amax = maximum(bits<F>(m));
  return spec.activation.element == kElementE5M2 ? make_scale<CodeE5M2>(amax, spec.activation)
                                                 : make_scale<CodeE4M3>(amax, spec.activation);
}

template <class D>
static Prepared prepare(const LinearSpec& spec, const LinearCall& call, bool normalised) {
  static thread_local Scratch memory, row_memory;
  const int64_t padded = round_up(spec.k, kChunk<D>);
  Prepared out;
  out.stride = round_up(padded, 1024) + 16;
  out.x = memory.get<float>(call.m * (out.stride + 1));
  out.factor = out.x + call.m * out.stride;
  const float* given = call.x_scale;
  float whole;
  if (spec.activation.enabled && !spec.activation.rows && !given) {
    DenormalGuard guard;
    whole = tensor_scale(spec, call, row_memory.get<float>(padded + 2 * W));
    given = &whole;
  }
  parallel_for(call.m, 8.0 * call.m * spec.k, [&](int64_t m) {
    static thread_local Scratch own;
    prepare_row<D>(spec, call, m, normalised, given, own.get<float>(padded + 2 * W), out);
  });
  return out;
}

}  // namespace BLOCKSCALE_ISA
