// x as the multiplication wants it: quantized where the numerics say so, scaled by powers of two, zero-padded to whole
// chunks and groups, and laid out as its arithmetic says. And y as the caller wants it.
#pragma once
#include "arithmetic.h"
#include "quantize.h"

namespace BLOCKSCALE_ISA {

struct Prepared {
  float* x;        // [m, stride] 32-bit lanes
  int64_t stride;  // odd in cache lines, so that rows do not fall on the same cache sets
  float* factor;   // [m]: what the results of a row must be multiplied by, a power of two; 1 for a row left as it is
  float* scale;    // [m, groups]: what a group's sum must be multiplied by; only for pairs
  int64_t groups;
};

// Quantizes a row in groups and reads it back. With `scales`, what is read back are the codes, and the scale of every
// kGroup columns goes there.
template <class C>
static void fake_quantize(float* row, int64_t k, int64_t group, const QuantizeRule& rule, const float* given,
                          float* scales) {
  for (int64_t c = 0; c < k; c += group) {
    const int64_t count = round_up(least(group, k - c), W);  // zeros follow the row
    float part[W];  // what lies behind a group that is no multiple of W
    const int64_t tail = c + least(group, k - c);
    if (count > tail - c) {
      memcpy(part, row + tail, sizeof part);
      memset(row + tail, 0, (count - (tail - c)) * 4);
    }
    const float scale = given ? *given : make_scale<C>(maximum(bits<F>(amax_bits(row + c, count, I{}))), rule);
    const F s = splat(scale), back = scales ? splat(1.0f) : s;
    for (int64_t i = c; i < c + count; i += W) store(row + i, round_trip<C>(load<F>(row + i) / s) * back);
    if (scales) for (int64_t g = c; g < tail; g += kGroup) scales[g / kGroup] = scale;
    if (count > tail - c) memcpy(row + tail, part, (count - (tail - c)) * 4);
  }
}

// Multiplies a row by a power of two that makes its largest magnitude 2^headroom ... 2^(headroom + 1), clear of fp32's
// subnormals. Returns what undoes it.
INLINE float normalise(float* row, int64_t count, int headroom) {
  int32_t exponent = bits<int32_t>(maximum(bits<F>(amax_bits(row, count, I{})))) >> 23;
  int up = headroom + 127 - (exponent ? exponent : 1);  // 0: a row of zeros or subnormals
  const F half = splat(ldexpf(1, up / 2)), rest = splat(ldexpf(1, up - up / 2));
  for (int64_t i = 0; i < count; i += W) store(row + i, load<F>(row + i) * half * rest);
  return ldexpf(1, headroom - up);
}

#if defined(BLOCKSCALE_INT16)
// The groups of a row to whole numbers of at most kMaxX, which their scales take back. A group with a NaN or an infinity
// gets the scale NaN.
template <class D>
static void to_integers(float* row, int64_t padded, float* scales) {
  typedef Int16Pairs<D> A;
  for (int64_t c = 0; c < padded; c += kGroup) {
    I largest = I{};
    for (int64_t i = c; i < c + kGroup; i += W) largest = max(largest, bits<I>(load<F>(row + i)) & 0x7FFFFFFF);
    const bool finite = !any(largest >= 0x7F800000);
    const float amax = finite ? maximum(bits<F>(largest)) : 0;
    const float inverse = amax > 0x1p-100f ? A::kMaxX / amax : 0;  // less is nothing beside a row's largest of 1 and more
    for (int64_t i = c; i < c + kGroup; i += W)
      store(row + i, load<F>(row + i) * inverse + splat(A::kMagic) - splat(A::kMagic));
    scales[c / kGroup] *= finite ? amax / (A::kMaxX * A::kSteps) : bits<float>(0x7FC00000u);
  }
}
#endif

INLINE int64_t padded_columns(int64_t k) { return round_up(k, kGroup); }  // whole stretches of gemv.h, whole groups

template <class A>
static void prepare_row(const LinearSpec& spec, const LinearCall& call, int64_t m, int headroom, const float* given,
                        float* row, const Prepared& out) {
  typedef typename A::D D;
  const int64_t k = spec.k, padded = padded_columns(k);
  float* scales = A::kPairs ? out.scale + m * out.groups : nullptr;
  read_floats(call.x, spec.x_type, m * k, k, row);
  memset(row + k, 0, (padded + W - k) * 4);
  if (spec.activation.enabled) {
    const int64_t group = spec.activation.group ? spec.activation.group : k;
    if (spec.activation.element == kElementE5M2) fake_quantize<CodeE5M2>(row, k, group, spec.activation, given, scales);
    else fake_quantize<CodeE4M3>(row, k, group, spec.activation, given, scales);
  }
  const bool codes = A::kPairs && spec.activation.enabled;  // of FP8, with scales of their own
  out.factor[m] = codes || (!A::kPairs && !headroom) ? 1 : normalise(row, padded, headroom);
  if (A::kPairs && !codes) for (int64_t g = 0; g < out.groups; g++) scales[g] = 1;
#if defined(BLOCKSCALE_INT16)
  if constexpr (A::kIntegers) to_integers<D>(row, padded, scales);
#endif
  float* to = out.x + m * out.stride;
  for (int64_t c = 0; c < padded; c += kChunk<D>, to += A::kVectors * W) A::arrange(row + c, to);
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

// headroom: 0 leaves fp32 rows as they are.
template <class A>
static Prepared prepare(const LinearSpec& spec, const LinearCall& call, int headroom) {
  static thread_local Scratch memory, row_memory;
  const int64_t padded = padded_columns(spec.k);
  Prepared out;
  out.stride = round_up(padded / (kChunk<typename A::D> / (A::kVectors * W)), 1024) + 16;
  out.groups = A::kPairs ? padded / kGroup : 0;
  out.x = memory.get<float>(call.m * (out.stride + 1 + out.groups));
  out.factor = out.x + call.m * out.stride;
  out.scale = out.factor + call.m;
  const float* given = call.x_scale;
  float whole;
  if (spec.activation.enabled && !spec.activation.rows && !given) {
    DenormalGuard guard;
    whole = tensor_scale(spec, call, row_memory.get<float>(padded + 2 * W));
    given = &whole;
  }
  parallel_for(call.m, 8.0 * call.m * spec.k, [&](int64_t m) {
    static thread_local Scratch own;
    prepare_row<A>(spec, call, m, headroom, given, own.get<float>(padded + 2 * W), out);
  });
  return out;
}

// Multiplies by the rows' factors, adds the bias and writes `rows` x `cols` results to y[m0 ..., n0 ...] in its type.
static void finish(const LinearSpec& spec, const LinearCall& call, const Prepared& x, int64_t m0, int64_t rows,
                   int64_t n0, int64_t cols, float* from, int64_t stride) {
  float bias[64];
  if (call.bias) read_floats(call.bias, call.bias_type, n0, cols, bias);
  for (int64_t a = 0; a < rows; a++, from += stride) {
    const float factor = x.factor[m0 + a];
    if (factor != 1) for (int64_t i = 0; i < cols; i++) from[i] *= factor;
    if (call.bias) for (int64_t i = 0; i < cols; i++) from[i] += bias[i];
    write_floats(from, cols, call.y, spec.y_type, (m0 + a) * spec.n + n0);
  }
}

}  // namespace BLOCKSCALE_ISA
