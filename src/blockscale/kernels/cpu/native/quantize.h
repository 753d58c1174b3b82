// fp32, bf16 or fp16 to FP8 with block scales: the bytes that blockscale/reference.py defines.
//
// Scale: amax / max of the block's finite values, an IEEE fp32 division, rounded as the rule says. Elements: encode.h.
#pragma once
#include <math.h>

#include "encode.h"
#include "parallel.h"

namespace BLOCKSCALE_ISA {

template <class C>
INLINE float make_scale(float amax, const QuantizeRule& rule) {
  amax = amax > rule.floor ? amax : rule.floor;
  const float scale = amax / C::kMax;
  if (rule.rounding == kRoundNone) return scale;
  int exponent;
  if (const int32_t u = bits<int32_t>(scale); u >= 1 << 23 && u < 0x7F800000) {  // normal: no call of the C library
    exponent = rule.rounding == kRoundPow2Ceil ? ((u + 0x7FFFFF) >> 23) - 127
                                               : (bits<int32_t>(amax) >> 23) - 127 - C::kMaxExponent;
    if (exponent >= -126 && exponent <= 127) return power_of_two(exponent);
  } else if (rule.rounding == kRoundPow2Ceil) {
    if (frexpf(scale, &exponent) == 0.5f) exponent--;
  } else {
    frexpf(amax, &exponent);
    exponent -= 1 + C::kMaxExponent;
  }
  exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
  return ldexpf(1, exponent);
}

INLINE void store_scale(float scale, void* to, int32_t type, int64_t i) {
  if (type == kE8M0) {
    uint32_t u = bits<uint32_t>(scale);
    ((uint8_t*)to)[i] = u == 0x00400000u ? 0 : (uint8_t)(u >> 23);
  } else {
    ((float*)to)[i] = scale;
  }
}

template <class X>
INLINE I amax_bits(const X* x, int64_t count, I so_far) {
  int64_t i = 0;
  for (; i + W <= count; i += W) so_far = max(so_far, finite_bits(widen(x + i)));
  if (i < count) so_far = max(so_far, finite_bits(widen_part(x + i, count - i)));
  return so_far;
}

// The largest magnitude as an integer, which infinities and NaNs exceed.
template <class X>
INLINE I largest_bits(const X* x, int64_t count, I so_far) {
  int64_t i = 0;
  if constexpr (kUpperHalf<X>) {  // two to a lane, compared as they are
    H halves = H{};
    for (; i + 2 * W <= count; i += 2 * W) {
      const H h = load<H>(x + i) & 0x7FFF;
      halves = halves > h ? halves : h;
    }
    so_far = max(so_far, max(bits<I>(halves) << 16, bits<I>(halves) & (int32_t)0xFFFF0000));
  }
  for (; i + W <= count; i += W) so_far = max(so_far, bits<I>(widen(x + i)) & 0x7FFFFFFF);
  if (i < count) so_far = max(so_far, bits<I>(widen_part(x + i, count - i)) & 0x7FFFFFFF);
  return so_far;
}

// Rows [r0, r1) and columns [c0, c1) of x, which share a scale.
struct Block { int64_t r0, r1, c0, c1; };

template <class C, class X>
INLINE BlockScale scale_of(const QuantizeRule& rule, const QuantizeCall& call, const Block& b, int64_t grid_index) {
  if (call.given) return {call.given[grid_index], false, false};
  const X* x = (const X*)call.x + b.c0;
  I m = I{};
  for (int64_t r = b.r0; r < b.r1; r++) m = largest_bits(x + r * call.cols, b.c1 - b.c0, m);
  const bool finite = !any(m >= 0x7F800000);
  if (!finite) {
    m = I{};
    for (int64_t r = b.r0; r < b.r1; r++) m = amax_bits(x + r * call.cols, b.c1 - b.c0, m);
  }
  const float scale = make_scale<C>(maximum(bits<F>(m)), rule);
  store_scale(scale, call.scale, call.scale_type, grid_index);
  return {scale,
          finite && scale >= 0x1p-126f && rule.rounding != kRoundPow2Floor,  // so amax / scale is kMax at most
          finite && scale >= Halved<C>::kLeast && scale <= Halved<C>::kMost};
}

template <class C, class X>
static void encode_block(const QuantizeCall& call, const Block& b, const BlockScale& scale) {
  const int64_t count = b.c1 - b.c0;
  for (int64_t r = b.r0; r < b.r1; r++) {
    const int64_t at = r * call.cols + b.c0;
    if (scale.ordinary) encode_row<C, true>((const X*)call.x + at, count, scale, call.data + at);
    else encode_row<C, false>((const X*)call.x + at, count, scale, call.data + at);
  }
}

// Columns of blocks that are scaled before they are encoded: a short block's scale is a long chain of operations, and
// several chains run side by side.
constexpr int kBlocksAhead = 8;

// Grid row g, whose rows are [r0, r1).
template <class C, class X>
static void quantize_strip(const QuantizeRule& rule, const QuantizeCall& call, int64_t g, int64_t r0, int64_t r1,
                           int64_t block_cols, int64_t grid_cols) {
  const int64_t step = r1 - r0 > 1 ? 1 : kBlocksAhead;
  for (int64_t first = 0; first < grid_cols; first += step) {
    const int64_t count = least(step, grid_cols - first);
    Block block[kBlocksAhead];
    BlockScale scale[kBlocksAhead];
    for (int64_t i = 0; i < count; i++) {
      const int64_t c0 = (first + i) * block_cols;
      block[i] = {r0, r1, c0, least(call.cols, c0 + block_cols)};
      scale[i] = scale_of<C, X>(rule, call, block[i], g * grid_cols + first + i);
    }
    for (int64_t i = 0; i < count; i++) encode_block<C, X>(call, block[i], scale[i]);
  }
}

template <class C, class X>
static void quantize_matrix(const QuantizeRule& rule, const QuantizeCall& call) {
  const int64_t rows = call.rows, cols = call.cols;
  const int64_t block_rows = rule.rows ? rule.rows : rows, block_cols = rule.group ? rule.group : cols;
  const int64_t grid_cols = (cols + block_cols - 1) / block_cols;
  const double work = 4.0 * rows * cols;
  if (!rule.rows && !call.given && rows > 64 && grid_cols == 1) {  // one block for everything: share its rows out
    int32_t* row_max = (int32_t*)malloc(rows * 4);
    if (!row_max) abort();
    parallel_for(rows, work, [&](int64_t r) {
      row_max[r] = bits<int32_t>(maximum(bits<F>(amax_bits((const X*)call.x + r * cols, cols, I{}))));
    });
    DenormalGuard guard;
    int32_t all = 0;
    for (int64_t r = 0; r < rows; r++) all = row_max[r] > all ? row_max[r] : all;
    free(row_max);
    float scale = make_scale<C>(bits<float>(all), rule);
    store_scale(scale, call.scale, call.scale_type, 0);
    parallel_for(rows, work, [&](int64_t r) { encode_block<C, X>(call, {r, r + 1, 0, cols}, {scale, false, false}); });
    return;
  }
  const int64_t strip = block_rows >= 16 ? 1 : 16 / block_rows;  // grid rows in a task
  const int64_t grid_rows = (rows + block_rows - 1) / block_rows;
  parallel_for((grid_rows + strip - 1) / strip, work, [&](int64_t task) {
    for (int64_t g = task * strip; g < least(grid_rows, (task + 1) * strip); g++)
      quantize_strip<C, X>(rule, call, g, g * block_rows, least(rows, (g + 1) * block_rows), block_cols, grid_cols);
  });
}

template <class C>
static void quantize_as(const QuantizeRule& rule, const QuantizeCall& call) {
  switch (call.x_type) {
    case kFloat32: return quantize_matrix<C, float>(rule, call);
    case kBFloat16: return quantize_matrix<C, Bf16>(rule, call);
    default: return quantize_matrix<C, Fp16>(rule, call);
  }
}

static void quantize(const QuantizeRule* rule, const QuantizeCall* call) {
  rule->element == kElementE5M2 ? quantize_as<CodeE5M2>(*rule, *call) : quantize_as<CodeE4M3>(*rule, *call);
}

}  // namespace BLOCKSCALE_ISA
