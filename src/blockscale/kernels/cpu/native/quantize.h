// fp32, bf16 or fp16 to FP8 with block scales: the bytes that blockscale/reference.py defines.
//
// Scale: amax / max of the block's finite values, an IEEE fp32 division, rounded as the rule says. Element:
// round-to-nearest-even(clamp(x / scale)), again a true division. NaN and infinities become the code 0x7F.
#pragma once
#include <math.h>

#include "numbers.h"
#include "parallel.h"

namespace BLOCKSCALE_ISA {

typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct Bf16 { uint16_t u; };
struct Fp16 { uint16_t u; };
template <class X>
constexpr bool kUpperHalf = false;  // whether a number is the upper half of its fp32
template <>
constexpr bool kUpperHalf<Bf16> = true;

INLINE F widen(const float* p) { return load<F>(p); }
INLINE U widen_halves(const void* p) {  // GCC 12's own conversions take vectors apart
#if defined(__AVX512F__)
  return bits<U>(_mm512_cvtepu16_epi32(load<__m256i>(p)));
#elif defined(__AVX2__)
  return bits<U>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
#else
  return __builtin_convertvector(load<Halves>(p), U);
#endif
}
INLINE Bytes low_bytes(I v) { return __builtin_convertvector(v, Bytes); }  // of each lane
INLINE void store_bytes(uint8_t* to, const I (&v)[4]) {  // lanes of 0 ... 255 as bytes
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i halves[2] = {_mm256_packs_epi32(bits<__m256i>(v[0]), bits<__m256i>(v[1])),
                             _mm256_packs_epi32(bits<__m256i>(v[2]), bits<__m256i>(v[3]))};
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works on 16 bytes at a time
  store(to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves[0], halves[1]), order));
#else
  for (int j = 0; j < 4; j++) store(to + j * W, low_bytes(v[j]));
#endif
}
INLINE F widen(const Bf16* p) { return bits<F>(widen_halves(p) << 16); }
INLINE F widen(const Fp16* p) {
  U h = widen_halves(p);
  U magnitude = (h & 0x7FFF) << 13;
  U value = bits<U>(bits<F>(magnitude) * 0x1p112f);
  value = magnitude >= (31u << 23) ? magnitude | 0x7F800000u : value;
  return bits<F>(value | (h & 0x8000) << 16);
}
template <class X>
INLINE F widen_part(const X* p, int64_t count) {  // fewer than W numbers, zeros behind them
  X part[W];
  memset(part, 0, sizeof part);
  memcpy(part, p, count * sizeof(X));
  return widen(part);
}

// The finite magnitudes of v as integers: they order like the numbers, and infinities and NaNs become 0.
INLINE I finite_bits(F v) {
  I a = bits<I>(v) & 0x7FFFFFFF;
  return a < 0x7F800000 ? a : I{};
}
INLINE I max(I a, I b) { return a > b ? a : b; }

struct CodeE4M3 { static constexpr int kMantissa = 3, kBias = 7, kMaxExponent = 8; static constexpr float kMax = 448; };
struct CodeE5M2 { static constexpr int kMantissa = 2, kBias = 15, kMaxExponent = 15; static constexpr float kMax = 57344; };

// Codes of `v`, one a lane. kOrdinary: every |v| is finite and rounds to kMax at most, so nothing is to be caught.
template <class C, bool kOrdinary = false>
INLINE I encode(F v) {
  constexpr int kShift = 23 - C::kMantissa;
  constexpr int32_t kMagic = (127 + 24 - C::kBias - C::kMantissa) << 23;  // a float whose ulp is the subnormals' step
  I b = bits<I>(v), magnitude = b & 0x7FFFFFFF;
  I a = magnitude;
  if (!kOrdinary) {
    const I limit = splat(bits<int32_t>(C::kMax));
    a = magnitude < limit ? magnitude : limit;
  }
  constexpr int32_t kRebias = ((127 - C::kBias) << 23) - ((1 << (kShift - 1)) - 1);
  I normal = (a - kRebias + ((a >> kShift) & 1)) >> kShift;  // of no meaning below the normal numbers
  I small = bits<I>(bits<F>(a) + bits<F>(splat(kMagic))) - kMagic;
  I code = a < ((128 - C::kBias) << 23) ? small : normal;
  code |= bits<I>(bits<U>(b) >> 24) & 0x80;  // the sign, of zero too
  if (kOrdinary) return code;
  return magnitude >= 0x7F800000 ? splat(0x7F) : code;
}

// `v` rounded to the nearest E4M3 or E5M2 number; NaN for NaN and infinities. What `encode` does, without the codes.
template <class C>
INLINE F round_trip(F v) {
  constexpr int kShift = 23 - C::kMantissa;
  const F magic = bits<F>(splat((127 + 24 - C::kBias - C::kMantissa) << 23));  // its ulp is the subnormals' step
  const I magnitude = bits<I>(v) & 0x7FFFFFFF, limit = splat(bits<int32_t>(C::kMax));
  const I a = magnitude < limit ? magnitude : limit;
  const I normal = (a + ((1 << (kShift - 1)) - 1) + ((a >> kShift) & 1)) & -(1 << kShift);
  const I small = bits<I>(bits<F>(a) + magic - magic);
  const I value = (a < ((128 - C::kBias) << 23) ? small : normal) | (bits<I>(v) & INT32_MIN);
  return bits<F>(magnitude >= 0x7F800000 ? splat(0x7FC00000) : value);
}

template <class C>
INLINE float make_scale(float amax, const QuantizeRule& rule) {
  amax = amax > rule.floor ? amax : rule.floor;
  if (rule.rounding == kRoundNone) return amax / C::kMax;
  int exponent;
  if (rule.rounding == kRoundPow2Ceil) {
    if (frexpf(amax / C::kMax, &exponent) == 0.5f) exponent--;
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

template <class C, bool kOrdinary, class X>
INLINE void encode_row(const X* x, int64_t count, float scale, uint8_t* data) {
  const F s = splat(scale);
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
    I codes[4];
    UNROLL for (int j = 0; j < 4; j++) codes[j] = encode<C, kOrdinary>(widen(x + i + j * W) / s);
    store_bytes(data + i, codes);
  }
  for (; i + W <= count; i += W) store(data + i, low_bytes(encode<C, kOrdinary>(widen(x + i) / s)));
  if (i < count) {
    Bytes part = low_bytes(encode<C, kOrdinary>(widen_part(x + i, count - i) / s));
    memcpy(data + i, &part, count - i);
  }
}

// Rows [r0, r1) and columns [c0, c1) of x, which share a scale.
struct Block { int64_t r0, r1, c0, c1; };
struct BlockScale {
  float scale;
  bool ordinary;  // see encode
};

template <class C, class X>
INLINE BlockScale scale_of(const QuantizeRule& rule, const QuantizeCall& call, const Block& b, int64_t grid_index) {
  if (call.given) return {call.given[grid_index], false};
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
  // so amax / scale is kMax at most
  return {scale, finite && scale >= 0x1p-126f && rule.rounding != kRoundPow2Floor};
}

template <class C, class X>
static void encode_block(const QuantizeCall& call, const Block& b, const BlockScale& scale) {
  const int64_t count = b.c1 - b.c0;
  for (int64_t r = b.r0; r < b.r1; r++) {
    const int64_t at = r * call.cols + b.c0;
    if (scale.ordinary) encode_row<C, true>((const X*)call.x + at, count, scale.scale, call.data + at);
    else encode_row<C, false>((const X*)call.x + at, count, scale.scale, call.data + at);
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
    parallel_for(rows, work, [&](int64_t r) { encode_block<C, X>(call, {r, r + 1, 0, cols}, {scale, false}); });
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
