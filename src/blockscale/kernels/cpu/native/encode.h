// fp32, bf16 or fp16 to codes of FP8: round-to-nearest-even(clamp(v)), NaN and infinities to 0x7F. And a row of them,
// divided by a scale: a true IEEE fp32 division.
#pragma once
#include "numbers.h"

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

struct CodeE4M3 {
  static constexpr int kMantissa = 3, kBias = 7, kMaxExponent = 8, kMaxCode = 0x7E;
  static constexpr float kMax = 448;
};
struct CodeE5M2 {
  static constexpr int kMantissa = 2, kBias = 15, kMaxExponent = 15, kMaxCode = 0x7B;
  static constexpr float kMax = 57344;
};

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

// -- bf16, two numbers to a 32-bit lane ---------------------------------------------------------------------------

INLINE UH less(UH a, UH b) {  // a - b, or 0
#if defined(__AVX512BW__)
  return bits<UH>(_mm512_subs_epu16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
  return bits<UH>(_mm256_subs_epu16(bits<__m256i>(a), bits<__m256i>(b)));
#else
  return a > b ? a - b : UH{};
#endif
}
INLINE UH low_halves(U a, U b) {  // of every lane, a's and b's by turns
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bits<UH>(_mm256_blend_epi16(bits<__m256i>(a), bits<__m256i>(b << 16), 0xAA));
#else
  return bits<UH>((a & 0xFFFF) | b << 16);
#endif
}

// What the numbers of a block share. Its scale must lie in kLeast ... kMost, clear of subnormal numbers.
template <class C>
struct Halved {
  static constexpr float kLeast = 0x1p-100f, kMost = 0x1p127f;
  static constexpr int kBottom = C::kBias - 1;  // normal numbers begin at 2^-kBottom
  F scale;
  UH bottom;  // the upper half, rounded up, of scale * 2^-kBottom
  explicit Halved(float s) : scale(splat(s)) {
    bottom = (uint16_t)(((bits<uint32_t>(s) + 0xFFFF) >> 16) - (kBottom << 7)) - UH{};
  }
};

// Codes of finite numbers that become less than twice kMax's power of two, one to 16 bits, without their signs.
//
// The difference of two positive floats, taken as integers, has the exponent of their quotient. So a float whose ulp is
// the step between codes there is known beside the quotient. Added, it leaves the number of steps in the sum's low
// half, at most 2^(kMantissa + 1): a quotient that rounds up to the next exponent is carried into it.
template <class C>
INLINE UH encode_halves(UH x, const Halved<C>& block) {
  constexpr int kUlp = 127 + 23 - C::kMantissa - Halved<C>::kBottom;
  const UH magnitude = x & 0x7FFF, above = less(magnitude, block.bottom);
  const UH step = above + (uint16_t)(kUlp << 7);  // the mantissa that is left in it is a multiple of the ulp
  const F even = bits<F>(bits<U>(magnitude) << 16) / block.scale + bits<F>(bits<U>(step) << 16);
  const F odd = bits<F>(bits<U>(magnitude) & 0xFFFF0000) / block.scale + bits<F>(bits<U>(step) & 0xFFFF0000);
  return low_halves(bits<U>(even), bits<U>(odd)) + ((above >> 7) << C::kMantissa);
}

template <class C>
INLINE void store_codes(uint8_t* to, UH code, UH x) {  // at most kMax, and with the signs of x
  typedef uint8_t HalfBytes __attribute__((vector_size(2 * W)));
  const UH most = (uint16_t)C::kMaxCode - UH{};
  store(to, __builtin_convertvector((code < most ? code : most) | (x >> 8 & 0x80), HalfBytes));
}
template <class C>
INLINE void store_codes(uint8_t* to, UH code_a, UH code_b, UH a, UH b) {
#if defined(__AVX512BW__)  // packing works on 16 bytes at a time; packs_epi16 saturates, so signs stay
  const __m512i codes = _mm512_min_epu8(_mm512_packus_epi16(bits<__m512i>(code_a), bits<__m512i>(code_b)),
                                        _mm512_set1_epi8(C::kMaxCode));
  const __m512i signs = _mm512_packs_epi16(bits<__m512i>(a), bits<__m512i>(b));
  const __m512i all = _mm512_or_si512(codes, _mm512_and_si512(signs, _mm512_set1_epi8(-128)));
  store(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), all));
#elif defined(__AVX2__)
  const __m256i codes = _mm256_min_epu8(_mm256_packus_epi16(bits<__m256i>(code_a), bits<__m256i>(code_b)),
                                        _mm256_set1_epi8(C::kMaxCode));
  const __m256i signs = _mm256_packs_epi16(bits<__m256i>(a), bits<__m256i>(b));
  const __m256i all = _mm256_or_si256(codes, _mm256_and_si256(signs, _mm256_set1_epi8(-128)));
  store(to, _mm256_permute4x64_epi64(all, 0xD8));
#else
  store_codes<C>(to, code_a, a);
  store_codes<C>(to + 2 * W, code_b, b);
#endif
}

// -- a row ----------------------------------------------------------------------------------------------------------

struct BlockScale {
  float scale;
  bool ordinary;  // see encode
  bool halved;    // whether encode_halves may be used
};

template <class C, bool kOrdinary, class X>
INLINE void encode_row(const X* x, int64_t count, const BlockScale& block, uint8_t* data) {
  const F s = splat(block.scale);
  int64_t i = 0;
  if constexpr (kUpperHalf<X>)
    if (block.halved) {
      const Halved<C> half(block.scale);
      for (; i + 4 * W <= count; i += 4 * W) {
        const UH a = load<UH>(x + i), b = load<UH>(x + i + 2 * W);
        store_codes<C>(data + i, encode_halves<C>(a, half), encode_halves<C>(b, half), a, b);
      }
      if (i + 2 * W <= count) {
        const UH a = load<UH>(x + i);
        store_codes<C>(data + i, encode_halves<C>(a, half), a);
        i += 2 * W;
      }
    }
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

}  // namespace BLOCKSCALE_ISA
